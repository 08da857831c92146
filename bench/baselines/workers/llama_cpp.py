"""llama.cpp through the low-level API of llama-cpp-python: token ids in, logits out.

Defaults are llama.cpp's (keys and values in float16, flash attention where it decides so), except
that a prompt is one micro-batch and that each sequence has a cache stream of its own.
"""

import importlib
import time
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

import numpy as np

from bench.baselines.protocol import Job, serve

UBATCH = 512


class LlamaCppWorker:
    """One model; a context per number of sequences, kept between calls."""

    def __init__(self, package: str, library: ModuleType) -> None:
        """Takes the module `library` of `package`, with llama.cpp's functions."""
        self._package = package
        self._library = library

    def load(self, job: Job) -> dict[str, str]:
        self._library.llama_backend_init()
        model = self._library.llama_model_load_from_file(
            job.model.encode(), self._library.llama_model_default_params()
        )
        if model is None:
            raise RuntimeError(f"llama.cpp cannot load {job.model}")
        self._model = model
        self._job = job
        self._contexts: dict[int, Context] = {}
        info = self._library.llama_print_system_info().decode()
        return {
            self._package: metadata.version(self._package),
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
            self._contexts[sequences] = Context(self._library, self._model, self._job, sequences)
        self._contexts[sequences].clear()
        return self._contexts[sequences]


class Context:
    """A `llama_context` with its batch."""

    def __init__(self, library: ModuleType, model: object, job: Job, sequences: int) -> None:
        length = min(job.length, -(-job.tokens // sequences))
        params = library.llama_context_default_params()
        # llama.cpp rounds each sequence's share to its own granularity.
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = max(UBATCH, sequences)
        params.n_threads = params.n_threads_batch = job.threads
        context = library.llama_init_from_model(model, params)
        if context is None:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences")
        self._library = library
        self._context = context
        self._memory = library.llama_get_memory(context)
        self._batch = library.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._positions = [0] * sequences

    def clear(self) -> None:
        self._library.llama_memory_clear(self._memory, False)
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
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._library.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(len(tokens), self._vocab_size))
        return [int(token) for token in rows.argmax(axis=-1)]


if __name__ == "__main__":
    serve(LlamaCppWorker("llama-cpp-python", importlib.import_module("llama_cpp")))
