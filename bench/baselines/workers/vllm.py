"""vLLM on the CPU, its engine in this process, without tokenizer and prefix cache."""

import os
import sys
import time

import torch

from bench.baselines.protocol import Job, serve


class VllmWorker:
    """`LLMEngine.step`, as `LLM.generate` drives it."""

    def load(self, job: Job) -> dict[str, str]:
        eager, zentorch = (bool(job.options.get(name)) for name in ("eager", "zentorch"))
        if not zentorch:
            sys.modules["zentorch"] = None  # type: ignore[assignment]  # as if not installed
        import vllm  # noqa: PLC0415  # it chooses its platform when it is imported
        from vllm.platforms import current_platform  # noqa: PLC0415

        if zentorch and not current_platform.is_zen_cpu():
            raise RuntimeError("vLLM found no use for zentorch on this processor")
        # vLLM takes whole GiB, and only from here.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(job.options["cache_gib"])
        llm = vllm.LLM(
            job.model,
            skip_tokenizer_init=True,
            dtype=job.precision,
            enforce_eager=eager,
            max_model_len=job.length,
            max_num_seqs=job.sequences,
            max_num_batched_tokens=max(2048, job.length),
            enable_prefix_caching=False,
            seed=0,
        )
        self._engine = llm.llm_engine
        self._params = vllm.SamplingParams
        self._next_id = 0
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "mode": "eager" if eager else "compiled",
            "platform": type(current_platform).__name__,
            "threads": str(torch.get_num_threads()),
        }

    def prefill(self, prompt: list[int]) -> list[float]:
        started = time.perf_counter()
        self._add(prompt, 1)
        self._finish()
        return [time.perf_counter() - started]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        # Prompts that end in different steps make some sequences longer than others.
        waiting = {self._add(prompt, steps + len(prompts) + 2) for prompt in prompts}
        running = tuple(waiting)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        self._engine.step()
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            outputs = self._engine.step()
            seconds.append(time.perf_counter() - started)
            if len(outputs) != len(prompts):
                raise RuntimeError(f"a step advanced {len(outputs)} of {len(prompts)} sequences")
        self._engine.abort_request(list(running))
        self._finish()
        return seconds

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        self._add(prompt, count)
        ids: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                ids = list(output.outputs[0].token_ids)
        return ids

    def _finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _add(self, prompt: list[int], answer: int) -> str:
        request_id = str(self._next_id)
        self._next_id += 1
        params = self._params(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return request_id


if __name__ == "__main__":
    serve(VllmWorker())
