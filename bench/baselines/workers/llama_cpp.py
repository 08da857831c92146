"""llama.cpp through the low-level API of llama-cpp-python: token ids in, logits out.

Defaults are llama.cpp's (keys and values in float16, flash attention where it decides so), except
that a prompt is one micro-batch and that each sequence has a cache stream of its own.
"""

import time
from collections.abc import Sequence
from importlib import metadata

import llama_cpp
import numpy as np

from bench.baselines.protocol import Job, serve

UBATCH = 512


class LlamaCppWorker:
    """One model; a context per number of sequences, kept between calls."""

    def load(self, job: Job) -> dict[str, str]:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            job.model.encode(), llama_cpp.llama_model_default_params()
        )
        if model is None:
            raise RuntimeError(f"llama.cpp cannot load {job.model}")
        self._model = model
        self._job = job
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._contexts: dict[int, Context] = {}
        info = llama_cpp.llama_print_system_info().decode()
        return {
            "llama-cpp-python": metadata.version("llama-cpp-python"),
            "system": info.strip(" |"),
            "threads": str(job.threads),
        }

    def prefill(self, prompt: list[int]) -> list[float]:
        context = self._context(1)
        started = time.perf_counter()
        context.decode([prompt])
        return [time.perf_counter() - started]

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        context = self._context(len(prompts))
        ids = [context.decode([prompt], first)[0] for first, prompt in enumerate(prompts)]
        ids = context.decode([[token] for token in ids])
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            ids = context.decode([[token] for token in ids])
            seconds.append(time.perf_counter() - started)
        return seconds

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        context = self._context(1)
        answer = context.decode([prompt])
        while len(answer) < count:
            answer += context.decode([answer[-1:]])
        return answer

    def _context(self, sequences: int) -> "Context":
        """An empty context for so many sequences."""
        if sequences not in self._contexts:
            length = min(self._job.length, -(-self._job.tokens // sequences))
            self._contexts[sequences] = Context(
                self._model, sequences, length, self._job.threads, self._vocab_size
            )
        self._contexts[sequences].clear()
        return self._contexts[sequences]


class Context:
    """A `llama_context` with its batch."""

    def __init__(
        self, model: object, sequences: int, length: int, threads: int, vocab_size: int
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        # llama.cpp rounds each sequence's share to its own granularity.
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = max(UBATCH, sequences)
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        if context is None:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = vocab_size
        self._positions = [0] * sequences

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._positions = [0] * len(self._positions)

    def decode(self, tokens: Sequence[Sequence[int]], first: int = 0) -> list[int]:
        """Appends tokens to sequences `first`, `first` + 1, …; returns each one's next token."""
        batch, row = self._batch, 0
        for sequence, ids in enumerate(tokens, first):
            for token in ids:
                batch.token[row] = token
                batch.pos[row] = self._positions[sequence]
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = 0
                self._positions[sequence] += 1
                row += 1
            batch.logits[row - 1] = 1
        batch.n_tokens = row
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(len(tokens), self._vocab_size))
        return [int(token) for token in rows.argmax(axis=-1)]


if __name__ == "__main__":
    serve(LlamaCppWorker())
