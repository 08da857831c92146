"""Chasqui's engine as a contender; also the reference that scores what the others generate."""

from collections.abc import Iterable
from pathlib import Path

import torch

from bench.baselines.protocol import Job, random_prompts, serve
from bench.engine.session import Session, Variant
from bench.host import versions
from model_service.loading.load_replica import load_replica


class ChasquiWorker:
    """`load_replica` and `Engine`, as the model service uses them."""

    def load(self, job: Job) -> dict[str, str]:
        quantized = job.precision in ("int8", "int4")
        dtype = job.options.get("dtype", "float32") if quantized else job.precision
        variant = Variant(Path(job.model), dtype, job.threads, job.precision if quantized else None)
        # So many that sequences which decode together begin together.
        at_once = {"max_step_tokens": max(512, job.tokens)}
        options = variant.options(job.sequences, job.length, job.tokens, at_once)
        replica = load_replica(options)
        self._session = Session(replica)
        self._vocab_size = replica.info.vocab_size
        return versions(("chasqui-llama", "torch")) | {"threads": str(torch.get_num_threads())}

    def prefill(self, tokens: int, seed: int) -> list[float]:
        (prompt,) = self._prompts(1, tokens, seed)
        return [self._session.until_first_token(self._session.add(prompt, 1))]

    def decode(self, batch: int, context: int, steps: int, seed: int) -> list[float]:
        run = self._session
        run.fill(self._prompts(batch, context, seed), steps + 2)
        seconds = [run.step().seconds for _ in range(steps)]
        run.clear()
        return seconds

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        request = self._session.add(tuple(prompt), count)
        while self._session.engine.has_work:
            self._session.step()
        return list(self._session.answers[request])

    def shortfalls(self, prompt: list[int], answer: list[int]) -> list[float]:
        """How much less probable than the best token each token of the answer is, in logprob."""
        return self._session.shortfalls(tuple(prompt), tuple(answer))

    def _prompts(self, count: int, length: int, seed: int) -> Iterable[tuple[int, ...]]:
        return map(tuple, random_prompts(count, length, self._vocab_size, seed))


if __name__ == "__main__":
    serve(ChasquiWorker())
