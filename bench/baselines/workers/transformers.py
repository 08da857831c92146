"""Hugging Face transformers in eager mode, with PyTorch's scaled_dot_product_attention."""

import time

import torch
import transformers

from bench.baselines.protocol import Job, random_prompts, serve


class TransformersWorker:
    """`LlamaForCausalLM` with its dynamic cache; a greedy loop without `generate`'s overhead."""

    def load(self, job: Job) -> dict[str, str]:
        torch.set_num_threads(job.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.precision), attn_implementation="sdpa"
        ).eval()
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": self._model.config._attn_implementation,  # noqa: SLF001
            "threads": str(torch.get_num_threads()),
        }

    def prefill(self, tokens: int, seed: int) -> list[float]:
        ids = self._prompts(1, tokens, seed)
        started = time.perf_counter()
        self._forward(ids, None)
        return [time.perf_counter() - started]

    def decode(self, batch: int, context: int, steps: int, seed: int) -> list[float]:
        cache = transformers.DynamicCache(config=self._model.config)
        ids = self._forward(self._prompts(batch, context, seed), cache)
        ids = self._forward(ids, cache)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            ids = self._forward(ids, cache)
            seconds.append(time.perf_counter() - started)
        return seconds

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        cache = transformers.DynamicCache(config=self._model.config)
        ids = torch.tensor([prompt])
        answer = []
        for _ in range(count):
            ids = self._forward(ids, cache)
            answer.append(int(ids))
        return answer

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        """The next token of each sequence [batch, 1]."""
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        next_ids: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return next_ids

    def _prompts(self, count: int, length: int, seed: int) -> torch.Tensor:
        vocab_size = self._model.config.vocab_size
        return torch.tensor(random_prompts(count, length, vocab_size, seed))


if __name__ == "__main__":
    serve(TransformersWorker())
