"""OpenVINO GenAI on the CPU: its continuous batching, on weights that optimum-intel converts."""

import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from bench.baselines.protocol import Job, serve

Handle = Any  # GenerationHandle, which the package does not export
WEIGHT_FORMATS = {"float32": "fp32", "bfloat16": "fp16"}  # on disk; others have equal names


class OpenVinoWorker:
    """`ContinuousBatchingPipeline.step`; with 16-bit weights it multiplies in bfloat16."""

    def load(self, job: Job) -> dict[str, str]:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = int(job.options["cache_gib"])
        scheduler.max_num_seqs = job.sequences
        scheduler.max_num_batched_tokens = max(job.length, job.tokens)  # prompts in one step
        wide = "f32" if job.precision == "float32" else "bf16"
        properties = {"INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": wide}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            converted(Path(job.model), job.precision), scheduler, "CPU", properties
        )
        self._next_id = 0
        packages = ("openvino", "openvino-genai", "optimum-intel", "nncf")
        return {**{name: metadata.version(name) for name in packages}, "threads": str(job.threads)}

    def prefill(self, prompt: list[int]) -> list[float]:
        started = time.perf_counter()
        handle = self._add(prompt, 1)
        self._finish()
        seconds = time.perf_counter() - started
        if (made := new_tokens(handle)) != 1:
            raise RuntimeError(f"the prompt made {made} tokens ({handle.get_status()})")
        return [seconds]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        handles = [self._add(prompt, steps + len(prompts) + 2) for prompt in prompts]
        while not all(handle.can_read() for handle in handles):
            self._pipeline.step()
        self._pipeline.step()
        for handle in handles:
            new_tokens(handle)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            self._pipeline.step()
            seconds.append(time.perf_counter() - started)
            made = [new_tokens(handle) for handle in handles]
            if set(made) != {1}:
                raise RuntimeError(f"a step made {made} tokens of the sequences")
        for handle in handles:
            handle.cancel()
        self._finish()
        return seconds

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        handle = self._add(prompt, count)
        self._finish()
        return [int(token) for token in handle.read_all()[0].generated_ids]

    def _finish(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _add(self, prompt: list[int], answer: int) -> Handle:
        self._next_id += 1
        config = openvino_genai.GenerationConfig(max_new_tokens=answer, ignore_eos=True)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._next_id, ids, config)


def new_tokens(handle: Handle) -> int:
    """Takes the tokens that are there; `read_all` would wait for the last one."""
    count = 0
    while handle.can_read():
        count += sum(len(output.generated_ids) for output in handle.read().values())
    return count


def converted(model: Path, precision: str) -> Path:
    """The folder of a Hugging Face model in OpenVINO's format, beside it, converted once."""
    folder = model.with_name(f"openvino-{precision}")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        program = (sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino")
        weights = ("--weight-format", WEIGHT_FORMATS.get(precision, precision))
        task = ("--task", "text-generation-with-past", "--disable-convert-tokenizer")
        command = (*program, "--model", str(model), *task, *weights)
        subprocess.run((*command, str(partial)), check=True)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVinoWorker())
