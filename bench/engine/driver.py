"""Loads an engine for a measurement, drives it as the service's thread does, and notes each step.

How an engine that looks ahead shares its work among calls of `step` is its own affair: one call may
launch a step and return the tokens of the step before. So single calls are not timed, but what lies
between the returns of neighbours.
"""

import dataclasses
import gc
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.engine.roofline import Work
from bench.engine.session import FIRST_ORDINARY_ID, GREEDY, Setting
from bench.gpu.weights import RandomWeights
from bench.shapes import Shape
from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.replica import Replica

QUANTIZED = ("int8", "int4", "fp8")
Prompt = tuple[int, ...]
_MOST_BLOCK = 64  # tokens of a block that any case asks for


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine is loaded for."""

    shape: Shape
    dtype: str  # of activations
    device: torch.device
    sequences: int  # at once
    length: int  # tokens of one sequence
    tokens: int  # of all sequences at once
    step_tokens: int  # most of one step
    precision: str | None = None  # of the weights; default: as the activations
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def replica_settings(self) -> dict[str, Setting]:
        """The fields of ReplicaOptions that differ from their defaults; the service's flags, too.

        Random weights make guesses of tokens worthless, so none are made.
        """
        return {
            "max_seq_len": self.length,
            "max_batch_size": self.sequences,
            "max_step_tokens": self.step_tokens,
            # A sequence's last block is rarely full.
            "kv_cache_tokens": max(self.tokens + _MOST_BLOCK * self.sequences, self.length),
            "dtype": self.dtype,
            "quantize": self.precision if self.precision in QUANTIZED else "none",
            "device": self.device.type,
            "draft_tokens": 0,
            "verify_checkpoint": False,
            **self.settings,
        }

    def options(self, ckpt_dir: Path) -> ReplicaOptions:
        """For `load_replica`; TypeError names a setting that the engine does not have."""
        options = ReplicaOptions(ckpt_dir)
        return dataclasses.replace(options, **self.replica_settings())  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of `Engine.step` brought."""

    ended: float  # time.perf_counter
    tokens: Mapping[int, int]  # generated, by request
    prompt_tokens: int  # computed


@dataclass(frozen=True, slots=True)
class Passage:
    """Some requests from their arrival to their last token."""

    prompts: Mapping[int, int]  # lengths, by request
    started: float  # time.perf_counter
    steps: Sequence[Step]

    def arrivals(self) -> list[list[float]]:
        """When each token came, by request."""
        times: dict[int, list[float]] = {request: [] for request in self.prompts}
        for step in self.steps:
            for request, count in step.tokens.items():
                times[request] += [step.ended] * count
        return [*times.values()]

    def seconds(self) -> list[float]:
        """From the end of the step before, or from the arrival, to the end of each step."""
        ends = [self.started, *(step.ended for step in self.steps)]
        return [after - before for before, after in itertools.pairwise(ends)]

    def works(self) -> list[Work]:
        """What each step had to compute."""
        made = dict.fromkeys(self.prompts, 0)
        mean = sum(self.prompts.values()) / len(self.prompts)
        works = []
        for step in self.steps:
            contexts = [self.prompts[each] + made[each] for each in step.tokens if made[each]]
            prompts = Work.part_of_prompts(step.prompt_tokens, mean)
            works.append(Work.decode(contexts) + prompts)
            for request, count in step.tokens.items():
                made[request] += count
        return works

    def all_decode(self) -> slice:
        """The steps in which every request has its first token and none has its last."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for request in step.tokens:
                first.setdefault(request, number)
                last[request] = number
        return slice(max(first.values()) + 1, min(last.values()) + 1)


class Driver:
    """An engine, and prompts for it."""

    def __init__(self, replica: Replica, seed: int = 0) -> None:
        self.engine: Engine = replica.engine()
        self._vocab_size = replica.info.vocab_size
        self._random = random.Random(seed)
        self._next_id = 0
        self._prompt_tokens = 0  # computed so far
        self._running: set[int] = set()

    def prompts(self, lengths: Iterable[int]) -> list[Prompt]:
        """Random ordinary tokens, never the same twice."""
        ordinary = range(FIRST_ORDINARY_ID, self._vocab_size)
        return [tuple(self._random.choices(ordinary, k=length)) for length in lengths]

    def add(self, prompt: Prompt, answer: int) -> int:
        """Adds a greedy request without stop tokens; returns its number."""
        request, self._next_id = self._next_id, self._next_id + 1
        self.engine.add(GenerationRequest(request, prompt, answer, GREEDY))
        self._running.add(request)
        return request

    def step(self) -> Step:
        """RuntimeError: the engine failed a sequence."""
        tokens: dict[int, int] = {}
        for output in self.engine.step():
            if output.error:
                raise RuntimeError(output.error)
            request = int(str(output.request_id))
            if output.ids:
                tokens[request] = tokens.get(request, 0) + len(output.ids)
            if output.finish_reason is not None:
                self._running.discard(request)
        # Once per step, as the service's thread does: it is a part of what a step costs.
        before, self._prompt_tokens = self._prompt_tokens, self.engine.load().prompt_tokens
        return Step(time.perf_counter(), tokens, self._prompt_tokens - before)

    def answer(self, prompts: Sequence[Prompt], answer: int) -> Passage:
        """All prompts at once, each answered with `answer` tokens."""
        started = time.perf_counter()
        lengths = {self.add(prompt, answer): len(prompt) for prompt in prompts}
        steps = []
        while self.engine.has_work:
            steps.append(self.step())
        return Passage(lengths, started, steps)

    def fill(self, prompts: Iterable[Prompt], answers: Iterable[int]) -> dict[int, int]:
        """Brings a sequence per prompt to its first token. Returns their contexts by request.

        RuntimeError: an answer was over before the last sequence began.
        """
        lengths = {
            self.add(prompt, answer): len(prompt)
            for prompt, answer in zip(prompts, answers, strict=True)
        }
        contexts: dict[int, int] = {}
        while len(contexts) < len(lengths):
            for request, count in self.step().tokens.items():
                contexts[request] = contexts.get(request, lengths[request]) + count
        if not lengths.keys() <= self._running:
            raise RuntimeError("the sequences never ran all at once: ask for longer answers")
        return contexts

    def cancel(self, request: int) -> None:
        """Ends a request, whose place the next one takes."""
        self._running.discard(request)
        self.engine.cancel(request)

    def clear(self) -> None:
        """Cancels what runs."""
        for request in tuple(self._running):
            self.cancel(request)
        while self.engine.has_work:
            self.step()


@contextmanager
def loaded(job: Job) -> Iterator[Driver]:
    """An engine on random weights, made on the job's device.

    StartError: the device has no room, or does not compute so.
    """
    weights = RandomWeights(job.shape.config)
    driver = Driver(load_replica(job.options(Path(job.shape.name)), source=weights))
    try:
        yield driver
    finally:
        driver.clear()


def free_memory() -> None:
    """Gives back to the device what engines that are gone have left in PyTorch's pools."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
