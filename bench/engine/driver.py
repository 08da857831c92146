"""The driver: loads an engine, drives it as the service's thread does, and records each step.

An engine that looks ahead may launch a step in one call of `step` and return the tokens of the step
before. So single calls are not timed: a step's seconds are those between the returns of two calls.
"""

import dataclasses
import gc
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import torch

from bench.checkpoint import RandomWeights
from bench.engine.roofline import Network, Work
from bench.shapes import FIRST_ORDINARY_ID, Shape
from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams, TokenLogprobs
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.runner import ModelRunner
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.replica import Replica
from model_service.model.graphs.step_graphs import StepGraphs

QUANTIZED = ("int8", "int4", "fp8")
GREEDY = SamplingParams(temperature=0.0)
MAX_BLOCK = 64  # tokens of the largest block that a case asks for

Setting = str | int | float | bool
Prompt = tuple[int, ...]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """Equal requests that arrive at once."""

    streams: int
    prompt: int  # tokens of each
    answer: int


@dataclass(frozen=True, slots=True)
class Job:
    """The engine that a measurement wants."""

    shape: Shape
    dtype: str  # of activations
    device: torch.device
    sequences: int = 1  # at once
    length: int = 512  # tokens of one sequence
    tokens: int = 512  # of all sequences at once
    step_tokens: int = 512  # most of one step
    precision: str | None = None  # of the weights; default: as the activations
    settings: Mapping[str, Setting] = field(default_factory=dict)
    ckpt_dir: Path | None = None  # default: random weights, made on the device

    @property
    def weights(self) -> str:
        """The format of the weights, for a result."""
        return self.precision or self.dtype

    @property
    def network(self) -> Network:
        wide = 4 if self.dtype == "float32" else 2
        kv_bytes = 1 if self.settings.get("kv_cache_dtype") == "fp8" else wide
        return Network(self.shape, self.weights, self.dtype, self.device.type, kv_bytes)

    def sized(self, sequences: int, length: int, tokens: int = 0, **settings: Setting) -> "Job":
        """The same for `sequences` of at most `length` tokens, `tokens` in all."""
        tokens = tokens or sequences * length
        sized = dataclasses.replace(self, sequences=sequences, length=length, tokens=tokens)
        return sized.with_settings(**settings)

    def with_settings(self, **settings: Setting) -> "Job":
        """The same with other fields of ReplicaOptions."""
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def replica_settings(self) -> dict[str, Setting]:
        """The fields of ReplicaOptions that differ from their defaults, also flags of the service.

        Random weights make drafts worthless, so a step makes one token per stream.
        """
        return {
            "max_seq_len": self.length,
            "max_batch_size": self.sequences,
            "max_step_tokens": self.step_tokens,
            # A sequence's last block is rarely full.
            "kv_cache_tokens": max(self.tokens + MAX_BLOCK * self.sequences, self.length),
            "dtype": self.dtype,
            "quantize": self.precision if self.precision in QUANTIZED else "none",
            "device": self.device.type,
            "draft_tokens": 0,
            "verify_checkpoint": False,
            **self.settings,
        }

    def load(self) -> Replica:
        """Raises StartError when the device has no room for it, or does not compute in its format,
        and TypeError for a setting that the engine does not have.
        """
        folder = self.ckpt_dir or Path(self.shape.name)
        options = dataclasses.replace(ReplicaOptions(folder), **self.replica_settings())  # type: ignore[arg-type]
        return load_replica(options, None if self.ckpt_dir else RandomWeights(self.shape.config))


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one call of `Engine.step`."""

    ended: float  # time.perf_counter
    tokens: Mapping[int, int]  # generated, by request
    prompt_tokens: int  # computed
    forward: float = 0.0  # seconds in the runner


@dataclass(frozen=True, slots=True)
class Trial:
    """The requests of an engine, and its steps, since it was idle."""

    prompts: dict[int, int]  # lengths, by request
    started: float  # time.perf_counter
    steps: list[Step]

    def arrivals(self) -> list[list[float]]:
        """When each token came, by request."""
        times: dict[int, list[float]] = {request: [] for request in self.prompts}
        for step in self.steps:
            for request, count in step.tokens.items():
                times[request] += [step.ended] * count
        return [*times.values()]

    def first_token_seconds(self) -> float:
        """From the arrival to the first token of the first request."""
        return self.arrivals()[0][0] - self.started

    def seconds(self) -> list[float]:
        """From the end of the step before, or from the arrival, to the end of each step."""
        ends = [self.started, *(step.ended for step in self.steps)]
        return [after - before for before, after in itertools.pairwise(ends)]

    def works(self) -> list[Work]:
        """The work of each step."""
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
        """The steps in which every request has its first token and none has its last.

        Raises:
            RuntimeError: there are none.
        """
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for request in step.tokens:
                first.setdefault(request, number)
                last[request] = number
        begin, end = max(first.values()) + 1, min(last.values()) + 1
        if begin >= end:
            raise RuntimeError("the streams never decoded all at once: ask for longer answers")
        return slice(begin, end)

    def decode_rate(self) -> float:
        """Tokens per second of all streams together, while all of them decode."""
        steps = self.all_decode()
        return sum(work.tokens for work in self.works()[steps]) / sum(self.seconds()[steps])

    def decode_bandwidth(self, network: Network) -> float:
        """Bytes per second that had to be read, while all streams decode."""
        steps = self.all_decode()
        read = sum(network.bytes(work) for work in self.works()[steps])
        return read / sum(self.seconds()[steps])


class TimedRunner:
    """A runner that adds up the seconds of its calls; all else is the runner's own."""

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


class Driver:
    """An engine, and the requests that a measurement gives it."""

    def __init__(self, replica: Replica, seed: int = 0) -> None:
        self._runner = TimedRunner(replica.runner)
        timed = dataclasses.replace(replica, runner=cast("ModelRunner", self._runner))
        self.engine: Engine = timed.engine()
        self.vocab_size = replica.info.vocab_size
        self.trial = Trial({}, 0.0, [])  # begins when a request comes to the idle engine
        self.answers: dict[int, list[int]] = {}  # ids so far, by request
        self.logprobs: dict[int, list[TokenLogprobs]] = {}  # that were asked for, by request
        self._random = random.Random(seed)
        self._prompt_tokens = 0  # computed so far
        self._running: set[int] = set()

    @property
    def graphs(self) -> StepGraphs | None:
        """The recorded steps of the engine's runner."""
        return cast("ModelRunner", self._runner).graphs

    def prompts(self, lengths: Iterable[int]) -> list[Prompt]:
        """Random ordinary tokens, never the same twice."""
        ordinary = range(FIRST_ORDINARY_ID, self.vocab_size)
        return [tuple(self._random.choices(ordinary, k=length)) for length in lengths]

    def add(
        self,
        prompt: Prompt,
        answer: int,
        sampling: SamplingParams = GREEDY,
        stop_ids: Iterable[int] = (),
        **logprobs: int,
    ) -> int:
        """Adds a request, with fields of GenerationRequest for logprobs; returns its number."""
        if not self.engine.has_work:
            self.trial = Trial({}, time.perf_counter(), [])
        request = len(self.answers)
        self.engine.add(
            GenerationRequest(request, prompt, answer, sampling, frozenset(stop_ids), **logprobs)  # type: ignore[arg-type]
        )
        self.trial.prompts[request] = len(prompt)
        self._running.add(request)
        self.answers[request], self.logprobs[request] = [], []
        return request

    def step(self) -> Step:
        """One step. Raises RuntimeError when the engine failed a sequence."""
        forward = self._runner.seconds
        tokens: dict[int, int] = {}
        for output in self.engine.step():
            if output.error:
                raise RuntimeError(output.error)
            request = cast("int", output.request_id)
            self.logprobs[request] += output.logprobs
            if output.ids:
                tokens[request] = tokens.get(request, 0) + len(output.ids)
                self.answers[request] += output.ids
            if output.finish_reason is not None:
                self._running.discard(request)
        # Read once per step, as the service's thread does: it is a part of what a step costs.
        before, self._prompt_tokens = self._prompt_tokens, self.engine.load().prompt_tokens
        ended = time.perf_counter()
        computed, forward = self._prompt_tokens - before, self._runner.seconds - forward
        self.trial.steps.append(Step(ended, tokens, computed, forward))
        return self.trial.steps[-1]

    def finish(self) -> Trial:
        """Steps until all answers are complete."""
        while self.engine.has_work:
            self.step()
        return self.trial

    def answer(self, prompts: Iterable[Prompt], answer: int) -> Trial:
        """All prompts at once to the idle engine, each answered with `answer` tokens."""
        for prompt in prompts:
            self.add(prompt, answer)
        return self.finish()

    def answer_load(self, load: Load) -> Trial:
        """As `answer`, with random prompts."""
        return self.answer(self.prompts([load.prompt] * load.streams), load.answer)

    def fill(self, prompts: Iterable[Prompt], answers: Iterable[int]) -> dict[int, int]:
        """Brings a sequence per prompt to its first token. Returns their contexts by request.

        Raises:
            RuntimeError: an answer was over before the last sequence began.
        """
        requests = [*map(self.add, prompts, answers)]
        while not all(self.answers[each] for each in requests):
            self.step()
        if not self._running.issuperset(requests):
            raise RuntimeError("the sequences never ran all at once: ask for longer answers")
        return {each: self.trial.prompts[each] + len(self.answers[each]) for each in requests}

    def shortfalls(self, prompt: Prompt, answer: Prompt) -> list[float]:
        """How much lower than the best logprob that of each token of `answer` is, given `prompt`.

        All zero when a greedy engine that computes the same function wrote the answer; near zero
        where it chose the other of two tokens that are equally probable.
        """
        request = self.add(prompt + answer, 0, logprobs=True, prompt_logprobs=True, top_logprobs=1)
        self.finish()
        entries = self.logprobs[request][len(prompt) :]
        return [entry.top[0][1] - entry.logprob for entry in entries]

    def cancel(self, request: int) -> None:
        """Ends a request; the next one gets its slot."""
        self._running.discard(request)
        self.engine.cancel(request)

    def clear(self) -> None:
        """Cancels what runs."""
        for request in tuple(self._running):
            self.cancel(request)
        self.finish()


@contextmanager
def loaded(job: Job) -> Iterator[Driver]:
    """A driver of a freshly loaded engine, whose memory is given back when the driver is gone."""
    driver = Driver(job.load())
    try:
        yield driver
    finally:
        driver.clear()
        del driver
        free_memory()


def free_memory() -> None:
    """Gives back to the device what engines that are gone have left in PyTorch's pools."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function in a process that ends with it: allocators keep what an engine had."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *args, **kwargs).result()
