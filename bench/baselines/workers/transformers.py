"""Hugging Face transformers, with PyTorch's scaled_dot_product_attention.

On the CPU in eager mode with its dynamic cache; on CUDA with a static cache and decode through
`torch.compile(mode="reduce-overhead")`, which replays CUDA graphs, as its documentation shows.
"""

import time
from typing import Any

import torch
import transformers

from bench.baselines.protocol import Job, serve

# The first call compiles, the second records the graph, the third is the first that replays it.
WARM_UP = 3


class TransformersWorker:
    """`LlamaForCausalLM`; a greedy loop without `generate`'s overhead."""

    def load(self, job: Job) -> dict[str, str]:
        torch.set_num_threads(job.threads)
        self._cuda = job.device == "cuda"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.precision), attn_implementation="sdpa"
        )
        self._model = model.to(job.device).eval()
        self._length = job.length
        self._compiled = self._forward
        if self._cuda:
            self._compiled = torch.compile(self._forward, mode="reduce-overhead", dynamic=False)
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": self._model.config._attn_implementation,  # noqa: SLF001
            "decode": "static cache, compiled" if self._cuda else "eager",
            "threads": str(torch.get_num_threads()),
        }

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> list[float]:
        ids = self._ids([prompt])
        started = self._now()
        self._forward(ids, None)
        return [self._now() - started]

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        cache = self._cache()
        ids = self._forward(self._ids(prompts), cache)
        for _ in range(WARM_UP):
            # The next replay of a graph overwrites the result of the last one.
            ids = self._compiled(ids, cache).clone()
        seconds = []
        for _ in range(steps):
            started = self._now()
            ids = self._compiled(ids, cache).clone()
            seconds.append(self._now() - started)
        return seconds

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        cache = self._cache()
        ids = self._ids([prompt])
        answer = []
        for _ in range(count):
            ids = self._forward(ids, cache)
            answer.append(int(ids))
        return answer

    def _cache(self) -> object:
        config = self._model.config
        if self._cuda:
            return transformers.StaticCache(config=config, max_cache_len=self._length)
        return transformers.DynamicCache(config=config)

    def _forward(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        """The next token of each sequence [batch, 1]."""
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        next_ids: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return next_ids

    def _ids(self, prompts: list[list[int]]) -> torch.Tensor:
        return torch.tensor(prompts, device=self._model.device)

    def _now(self) -> float:
        """Seconds, once the device has finished its work."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    serve(TransformersWorker())
