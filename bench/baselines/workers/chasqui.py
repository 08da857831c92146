"""Chasqui's engine as a contender; also the reference that scores the answers of all."""

from pathlib import Path

import torch

from bench.baselines.protocol import Job, random_prompts, serve
from bench.engine import driver
from bench.report import versions
from bench.shapes import Shape
from model_service.model.weights.files.meta_params import read_params


class ChasquiWorker:
    """`load_replica` and `Engine`, as the model service uses them."""

    def load(self, job: Job) -> dict[str, str]:
        folder, precision = Path(job.model), job.precision
        quantized = precision in driver.QUANTIZED
        settings: dict[str, driver.Setting] = (
            {"threads": job.threads} if job.device == "cpu" else {}
        )
        wanted = driver.Job(
            Shape(folder.name, read_params(folder / "params.json")),
            job.options["dtype"] if quantized else precision,
            torch.device(job.device),
            # So many that sequences which decode together begin together.
            step_tokens=max(512, job.tokens),
            precision=precision if quantized else None,
            settings=settings,
            ckpt_dir=folder,
        ).sized(job.sequences, job.length, job.tokens)
        self._driver = driver.Driver(wanted.load())
        threads = {"threads": str(torch.get_num_threads())}
        return {**versions(), **threads}

    def prefill(self, tokens: int, seed: int) -> list[float]:
        return [sum(self._answer(1, tokens, 1, seed).seconds())]

    def decode(self, batch: int, context: int, steps: int, seed: int) -> list[float]:
        trial = self._answer(batch, context, steps + 1, seed)
        return trial.seconds()[trial.all_decode()]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        trial = self._driver.answer([tuple(prompt)], count)
        return self._driver.answers[next(iter(trial.prompts))]

    def shortfalls(self, prompt: list[int], answer: list[int]) -> list[float]:
        """How much less probable than the best token each token of the answer is, in logprob."""
        return self._driver.shortfalls(tuple(prompt), tuple(answer))

    def _answer(self, count: int, length: int, answer: int, seed: int) -> driver.Trial:
        prompts = random_prompts(count, length, self._driver.vocab_size, seed)
        return self._driver.answer([*map(tuple, prompts)], answer)


if __name__ == "__main__":
    serve(ChasquiWorker())
