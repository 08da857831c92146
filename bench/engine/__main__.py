"""The engine's speed on a device, beside the best that the device can do.

Cases that need the same engine share it. Weights are random: on the CPU from a checkpoint in
--work_dir, on a GPU made on the device. Results are written after every case.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench.checkpoint import ensure_checkpoint
from bench.engine import arrivals, memory, throughput, variants
from bench.engine.crowd import crowd
from bench.engine.driver import Job, Load, free_memory, loaded
from bench.engine.parts import step_parts
from bench.engine.roofline import WEIGHT_BYTES, Rates, measure_rates
from bench.engine.shards import shards
from bench.engine.throughput import Loaded
from bench.engine.trace import profile_steps
from bench.report import Recorder, Row, command_parser, cores, finish, read_host
from bench.shapes import SHAPES
from model_service.loading.precision import DTYPES


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each case measures, by default on a CPU; lengths are in tokens."""

    rounds: int = 3
    steps: int = 32  # decode steps of the sweeps, and of the case crowd
    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # of the decode sweep
    contexts: tuple[int, ...] = (16, 128, 256, 512, 1024)  # of the context sweep
    batch: int = 8  # streams of the cases batch, profile and blocks
    short_prompt: int = 32  # of the decode sweep, one_stream, formats and blocks
    prompt: int = 128
    answer: int = 64
    prefill: int = 512  # prompt of the case prefill
    long_prompt: int = 4000  # that arrives amid streams
    crowd: tuple[int, int, int] = (64, 72, 100)  # Load of sequences of mixed lengths
    traced_steps: int = 4
    step_tokens: int | None = None  # most of one step; default: all prompts of a case together


GPU = Sizes(
    streams=(1, 4, 16, 64, 256),
    contexts=(128, 1024, 3072),
    batch=64,
    short_prompt=128,
    prompt=512,
    answer=256,
    prefill=2048,
    crowd=(256, 288, 400),
    traced_steps=16,
    step_tokens=2048,
)
TINY = Sizes(1, 3, (1, 3), (4, 12), 3, 8, 16, 12, 32, 64, (5, 20, 40), 3)

PRESETS = {"cpu": Sizes(), "gpu": GPU, "tiny": TINY}

# Cases of one engine, with the loads that it must hold, and the cases that load their own.
SHARED: dict[str, Callable[[Sizes], list[Load]]] = {
    "one_stream": lambda sizes: [Load(1, sizes.short_prompt, sizes.answer)],
    "batch": lambda sizes: [Load(sizes.batch, sizes.prompt, sizes.answer)],
    "decode": lambda sizes: [Load(n, sizes.short_prompt, sizes.steps + 1) for n in sizes.streams],
    "context": lambda sizes: [Load(8, each, sizes.steps + 1) for each in sizes.contexts],
    "prefill": lambda sizes: [Load(1, sizes.prefill, 1)],
    "first_token": lambda sizes: [Load(1, sizes.prompt, 1)],
    "profile": lambda sizes: [
        Load(n, sizes.prompt, sizes.answer + 4 * sizes.traced_steps) for n in (1, sizes.batch)
    ],
    "parts": lambda sizes: [
        Load(n, sizes.short_prompt, 2 * sizes.steps + 8) for n in (1, sizes.batch)
    ],
    "crowd": lambda sizes: [Load(*sizes.crowd)],
    "host": lambda sizes: [Load(sizes.batch, sizes.prompt, 2 * sizes.answer)],
}
ALONE = ("load", "dialog", "stall", "kv_cache", "shards", "invariance", "formats", "blocks")
ON_CPU = ("load", "prefill", "decode", "context", "dialog", "stall", "kv_cache", "shards")
ALL_FORMATS = ("formats", "blocks")  # each has all formats by itself
# Cases with a profiler come after others of the same engine, because it may slow those down.
ON_GPU = (
    *("one_stream", "batch", "prefill", "first_token", "host", "crowd", "profile", "invariance"),
    *ALL_FORMATS,
)
SIZE_FLAGS = ("rounds", "steps", "streams", "contexts")  # fields of Sizes


@dataclass(frozen=True, slots=True)
class Bench:
    """The run of one shape with weights in one format."""

    job: Job  # without sizes
    sizes: Sizes
    recorder: Recorder

    def run(self, cases: Iterable[str]) -> None:
        """The cases, those that share an engine first."""
        cases = tuple(cases)
        if shared := [case for case in cases if case in SHARED]:
            self._attempt("engine", lambda: self._shared(shared))
        for case in ALONE:
            if case in cases:
                self._attempt(case, functools.partial(self._alone, case))

    def rates(self) -> Rates:
        """The device's rates: of a CPU anew each time, as others use it, of a GPU once."""
        measure = _gpu_rates if self.job.device.type == "cuda" else measure_rates
        return measure(self.job.device, self.job.dtype)

    def _attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> None:
        self.recorder.attempt(case, measure)
        free_memory()

    def _shared(self, cases: list[str]) -> Iterator[Row]:
        crowd = Load(*self.sizes.crowd)
        loads = [load for case in cases for load in SHARED[case](self.sizes)]
        at_once = max(load.streams * load.prompt for load in loads)
        # The lengths of a crowd are mixed: an average sequence has half of the longest one's.
        room = max(
            load.streams * (load.prompt + load.answer) // (2 if load == crowd else 1)
            for load in loads
        )
        length = max(load.prompt + load.answer for load in loads)
        streams = max(load.streams for load in loads)
        sized = self.job.sized(streams, length, max(room, length))
        sized = dataclasses.replace(sized, step_tokens=self.sizes.step_tokens or at_once)
        with loaded(sized) as driver:
            engine = Loaded(sized, driver, self.rates, self.sizes.rounds)
            for case in cases:
                self.recorder.attempt(case, functools.partial(self._measure, engine, case))
                driver.clear()
        rates = self.rates()
        products = {f"{kind}_gflop_per_s": rate / 1e9 for kind, rate in rates.matrix.items()}
        bandwidths = {"copy_gb_per_s": rates.copy / 1e9, "read_gb_per_s": rates.read / 1e9}
        yield Row("device", {"dtype": self.job.dtype}, {**bandwidths, **products})

    def _measure(self, engine: Loaded, case: str) -> Iterator[Row]:
        sizes = self.sizes
        for load in SHARED[case](sizes):
            if case == "profile":
                yield from profile_steps(engine, load, sizes.traced_steps)
            elif case == "host":
                yield from arrivals.host(engine, load)
            elif case == "parts":
                yield from step_parts(engine, load, sizes.steps)
            elif case == "crowd":
                yield from crowd(engine, load, sizes.steps, sizes.traced_steps)
            elif load.answer == 1:
                yield throughput.first_token(case, engine, load)
            else:
                yield throughput.decode(case, engine, load)

    def _alone(self, case: str) -> Iterator[Row]:
        job, sizes = self.job, self.sizes
        if case == "load":
            load = Load(1, sizes.short_prompt, sizes.steps + 1)
            return memory.load_time(job, load, sizes.rounds)
        if case == "kv_cache":
            return memory.cache_memory(job, sequences=9, tokens=sizes.prefill // 2)
        if case == "dialog":
            return arrivals.dialog(job, turns=10, user=max(8, sizes.prefill // 8), answer=8)
        if case == "stall":
            return arrivals.stall(job, 8, sizes.short_prompt, sizes.long_prompt)
        if case == "shards":
            possible = job.shape.config.shard_counts()
            counts = [n for n in (1, 2, 4) if n <= cores() and n in possible]
            return shards(job, counts, Load(8, sizes.short_prompt, sizes.steps + 1))
        job = dataclasses.replace(job, step_tokens=sizes.step_tokens or 2048)
        wide = dataclasses.replace(job, precision=None)
        one, batch = (Load(n, sizes.short_prompt, sizes.answer) for n in (1, sizes.batch))
        compared = {
            "invariance": (variants.invariance(job), [one, batch]),
            "formats": (variants.formats(wide), [one]),
            "blocks": (variants.block_sizes(wide), [batch]),
        }
        return variants.side_by_side(
            case,
            *compared[case],
            long_prompt=sizes.prefill,
            rounds=sizes.rounds,
            rates=self.rates(),
            add_note=self.recorder.add_note,
        )


@functools.cache
def _gpu_rates(device: torch.device, dtype: str) -> Rates:
    return measure_rates(device, dtype)


def main(arguments: list[str] | None = None, default_device: str | None = None) -> None:
    args = _parser(default_device).parse_args(arguments)
    deadline = time.monotonic() + args.seconds
    shapes = args.shapes or ["7B" if args.device == "cuda" else "110M"]
    finish(*[_run_shape(name, args, deadline) for name in shapes])


def _run_shape(name: str, args: argparse.Namespace, deadline: float) -> Recorder:
    cuda, device, shape = args.device == "cuda", torch.device(args.device), SHAPES[name]
    host = read_host(args.device)
    details = {"shape": name, "parameters": shape.parameters}
    recorder = Recorder("engine", args.results, details, name, host, deadline)
    given = {flag: getattr(args, flag) for flag in SIZE_FLAGS if getattr(args, flag) is not None}
    sizes = dataclasses.replace(PRESETS[args.sizes or ("gpu" if cuda else "cpu")], **given)
    cases = args.cases or (ON_GPU if cuda else ON_CPU)
    folder = None
    if not cuda or "load" in cases:
        folder = ensure_checkpoint(shape, args.work_dir, device)
    job = Job(shape, host.wide_dtype, device, ckpt_dir=folder)
    quantized = [] if cuda else ["int8", "int4"]
    for number, precision in enumerate(args.precisions or [host.wide_dtype, *quantized]):
        if precision in DTYPES:
            bench = Bench(dataclasses.replace(job, dtype=precision), sizes, recorder)
        else:
            bench = Bench(dataclasses.replace(job, precision=precision), sizes, recorder)
        bench.run(case for case in cases if number == 0 or case not in ALL_FORMATS)
    return recorder


def _parser(device: str | None) -> argparse.ArgumentParser:
    default = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parser = command_parser("gpu" if device else "engine", __doc__, default_device=default)
    add = parser.add_argument
    add("--cases", nargs="+", choices=[*SHARED, *ALONE], help="default: those of the device")
    add("--shapes", nargs="+", choices=SHAPES, help="default: 110M, on a GPU 7B")
    add("--precisions", nargs="+", choices=WEIGHT_BYTES, help="formats of the weights")
    add("--sizes", choices=PRESETS, help="how much each case measures; default: by device")
    add("--rounds", type=int, help="repetitions of each measurement")
    add("--steps", type=int, help="decode steps per repetition, of the sweeps, crowd and shards")
    add("--streams", type=int, nargs="+", help="numbers of streams of the case decode")
    add("--contexts", type=int, nargs="+", help="tokens that the streams of context begin with")
    add("--seconds", type=float, default=float("inf"), help="no case begins later; default: no end")
    return parser


if __name__ == "__main__":
    main()
