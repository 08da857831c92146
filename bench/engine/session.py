"""Drives an engine in this process and times its steps.

It drives `load_replica`, `add`, `step`, `cancel` and `load`, as the model service does.
"""

import dataclasses
import gc
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams, TokenLogprobs
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.runner import ModelRunner
from model_service.loading.load_replica import load_replica
from model_service.loading.options import Dtype, Quantize, ReplicaOptions
from model_service.loading.replica import Replica

GREEDY = SamplingParams(temperature=0.0)
FIRST_ORDINARY_ID = 259  # behind the control and byte pieces of a Llama 2 vocabulary

Setting = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Variant:
    """How a checkpoint is loaded for a measurement."""

    ckpt_dir: Path
    dtype: str
    threads: int | None = None  # the engine's own choice
    quantize: str | None = None

    @property
    def precision(self) -> str:
        return self.quantize or self.dtype

    def options(
        self,
        sequences: int,
        length: int,
        tokens: int | None = None,
        settings: Mapping[str, Setting] | None = None,
    ) -> ReplicaOptions:
        """Options for `sequences` of at most `length` tokens, `tokens` in all."""
        options = ReplicaOptions(
            self.ckpt_dir,
            max_seq_len=length,
            max_batch_size=sequences,
            # A sequence's last block is rarely full.
            kv_cache_tokens=max((tokens or sequences * length) + 16 * sequences, length),
            dtype=cast("Dtype", self.dtype),
            quantize=cast("Quantize", self.quantize or "none"),
            device="cpu",
            threads=self.threads,
            verify_checkpoint=False,
            draft_tokens=0,  # a step makes one token per stream, as everybody's does
        )
        return dataclasses.replace(options, **(settings or {}))  # type: ignore[arg-type]  # by name


class TimedRunner:
    """A runner that adds up the seconds of its forward passes; all else is the runner's own."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.seconds = 0.0

    def execute(self, plan: StepPlan) -> object:
        started = time.perf_counter()
        result = self._runner.execute(plan)
        self.seconds += time.perf_counter() - started
        return result

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine."""

    seconds: float
    forward: float  # seconds of it in the forward pass
    tokens: Mapping[int, int]  # generated, by request id


class Session:
    """An engine, and the requests that a measurement gave it."""

    def __init__(self, replica: Replica, seed: int = 0) -> None:
        self._runner = TimedRunner(replica.runner)
        timed = dataclasses.replace(replica, runner=cast("ModelRunner", self._runner))
        self.engine: Engine = timed.engine()
        self._vocab_size = replica.info.vocab_size
        self._random = random.Random(seed)
        self._next_id = 0
        self._running: set[int] = set()
        self.answers: dict[int, tuple[int, ...]] = {}  # ids so far, by request id

    def prompts(self, count: int, length: int) -> list[tuple[int, ...]]:
        """So many of `prompt`."""
        return [self.prompt(length) for _ in range(count)]

    def prompt(self, length: int) -> tuple[int, ...]:
        """Random ordinary tokens, never the same twice."""
        return tuple(
            self._random.randrange(FIRST_ORDINARY_ID, self._vocab_size) for _ in range(length)
        )

    def add(self, prompt: tuple[int, ...], answer: int, *, logprobs: bool = False) -> int:
        """Adds a greedy request without stop tokens; returns its id."""
        request_id = self._next_id
        self._next_id += 1
        self.engine.add(GenerationRequest(request_id, prompt, answer, GREEDY, logprobs=logprobs))
        self._running.add(request_id)
        self.answers[request_id] = ()
        return request_id

    def step(self) -> Step:
        """One step, timed.

        Raises:
            RuntimeError: the engine failed a sequence.
        """
        forward, started = self._runner.seconds, time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - started
        tokens: dict[int, int] = {}
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            request_id = cast("int", output.request_id)
            tokens[request_id] = tokens.get(request_id, 0) + len(output.ids)
            self.answers[request_id] += output.ids
            if output.finish_reason is not None:
                self._running.discard(request_id)
        return Step(seconds, self._runner.seconds - forward, tokens)

    def until_first_token(self, request_id: int) -> float:
        """Steps until the request has a token. Returns the seconds that took."""
        started = time.perf_counter()
        while not self.step().tokens.get(request_id):
            pass
        return time.perf_counter() - started

    def fill(self, prompts: Iterable[tuple[int, ...]], answer: int) -> None:
        """Brings a sequence per prompt to its second token.

        Where a step holds all prompts they begin together; else the first have a start.

        Raises:
            RuntimeError: an answer was over before the last sequence began.
        """
        added = {self.add(prompt, answer) for prompt in prompts}
        waiting = set(added)
        while waiting:
            waiting -= {request for request, count in self.step().tokens.items() if count}
        self.step()
        if not added <= self._running:
            raise RuntimeError("the sequences never ran all at once: ask for longer answers")

    def shortfalls(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
        """How much lower than the best logprob that of each token of `answer` is, given `prompt`.

        All zero when a greedy engine that computes the same function wrote the answer; near zero
        where it took the other of two tokens that are equally probable.
        """
        request_id, self._next_id = self._next_id, self._next_id + 1
        self.engine.add(
            GenerationRequest(
                request_id,
                prompt + answer,
                max_gen_len=0,
                sampling=GREEDY,
                logprobs=True,
                prompt_logprobs=True,
                top_logprobs=1,
            )
        )
        entries: list[TokenLogprobs] = []
        while self.engine.has_work:
            for output in self.engine.step():
                entries += output.logprobs
        return [entry.top[0][1] - entry.logprob for entry in entries[len(prompt) :]]

    def clear(self) -> None:
        """Cancels what runs."""
        for request_id in tuple(self._running):
            self.engine.cancel(request_id)
        while self.engine.has_work:
            self.step()


@contextmanager
def session(options: ReplicaOptions) -> Iterator[Session]:
    """A session on a freshly loaded engine, whose memory is given back at the end."""
    opened = Session(load_replica(options))
    try:
        yield opened
    finally:
        opened.clear()
        del opened
        gc.collect()
