"""Chasqui's engine as a contender; also the reference that scores the answers of all."""

from pathlib import Path

import torch

from bench.baselines.protocol import Job, serve
from bench.engine import driver
from bench.report import versions
from bench.shapes import Shape
from model_service.model.weights.files.meta.params import read_params


class ChasquiWorker:
    """`load_replica` and `Engine`, as the model service uses them."""

    def load(self, job: Job) -> dict[str, str]:
        folder, precision = Path(job.model), job.precision
        quantized = precision in driver.QUANTIZED
        wanted = driver.Job(
            Shape(folder.name, read_params(folder / "params.json")),
            job.options["dtype"] if quantized else precision,
            torch.device(job.device),
            # So many that sequences which decode together begin together.
            step_tokens=max(512, job.tokens),
            precision=precision if quantized else None,
            settings={"threads": job.threads} if job.device == "cpu" else {},
            ckpt_dir=folder,
        ).sized(job.sequences, job.length, job.tokens)
        self._driver = driver.Driver(wanted.load())
        return {**versions(), "threads": str(torch.get_num_threads())}

    def prefill(self, prompt: list[int]) -> list[float]:
        return [sum(self._driver.answer([tuple(prompt)], 1).seconds())]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        trial = self._driver.answer(map(tuple, prompts), steps + 1)
        return trial.seconds()[trial.all_decode()]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        (request,) = self._driver.answer([tuple(prompt)], count).prompts
        return self._driver.answers[request]

    def shortfalls(self, prompt: list[int], answer: list[int]) -> list[float]:
        """How much less probable than the best token each token of the answer is, in logprob."""
        return self._driver.shortfalls(tuple(prompt), tuple(answer))


if __name__ == "__main__":
    serve(ChasquiWorker())
