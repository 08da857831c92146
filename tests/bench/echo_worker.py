"""A worker that computes nothing: it answers what it was asked, and fails or dies on request."""

import os

from bench.baselines.protocol import Job, serve


class EchoWorker:
    def load(self, job: Job) -> dict[str, str]:
        print("libraries print to stdout")
        if job.precision == "unknown":
            raise ValueError("precision unknown")
        return {"process": str(os.getpid())}

    def prefill(self, prompt: list[int]) -> list[float]:
        if not prompt:
            raise RuntimeError("out of tokens")
        return [float(sum(prompt))]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        return [float(sum(map(sum, prompts)))] * steps

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        if not prompt:
            os._exit(3)
        return prompt[:count]


if __name__ == "__main__":
    serve(EchoWorker())
