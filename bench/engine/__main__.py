"""The engine's speed on a device, beside the best that the device can do: python -m bench.engine

Cases that need the same engine share it. Weights are random: on the CPU from a checkpoint in
--work_dir, on a GPU made on the device. Results are written after every case.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from bench.checkpoint import ensure_checkpoint
from bench.engine import arrivals, memory, throughput, variants
from bench.engine.crowd import crowd
from bench.engine.driver import Job, free_memory, loaded
from bench.engine.roofline import WEIGHT_BYTES, Rates, measure_rates
from bench.engine.shards import shards
from bench.engine.throughput import Load, Loaded
from bench.engine.trace import profile_steps
from bench.report import RESULTS, WORK_DIR, Recorder, Row, cores, read_host
from bench.shapes import SHAPES
from model_service.loading.precision import DTYPES


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each case measures; lengths are in tokens."""

    rounds: int
    steps: int  # decode steps of the sweeps
    streams: tuple[int, ...]  # of the decode sweep
    context: int  # that streams of the decode sweep begin with
    contexts: tuple[int, ...]  # of the context sweep
    batch: int  # streams of the cases batch, profile and blocks
    short_prompt: int
    prompt: int
    answer: int
    prefill: int  # prompt of the case prefill
    long_prompt: int  # that arrives amid streams
    crowd: Load  # sequences of mixed lengths
    crowd_steps: int
    traced_steps: int
    step_tokens: int | None = None  # most of one step; default: all prompts of a case together


CPU = Sizes(
    rounds=3,
    steps=32,
    streams=(1, 2, 4, 8, 16, 32, 64),
    context=32,
    contexts=(16, 128, 256, 512, 1024),
    batch=8,
    short_prompt=32,
    prompt=128,
    answer=64,
    prefill=512,
    long_prompt=4000,
    crowd=Load(64, 72, 100),
    crowd_steps=12,
    traced_steps=4,
)
GPU = dataclasses.replace(
    CPU,
    streams=(1, 4, 16, 64, 256),
    contexts=(128, 1024, 3072),
    batch=64,
    short_prompt=128,
    prompt=512,
    answer=256,
    prefill=2048,
    crowd=Load(256, 288, 400),
    crowd_steps=64,
    traced_steps=16,
    step_tokens=2048,
)
TINY = Sizes(1, 3, (1, 3), 8, (4, 12), 3, 8, 16, 12, 32, 64, Load(5, 20, 40), 4, 3)

PRESETS = {"cpu": CPU, "gpu": GPU, "tiny": TINY}

# Cases of one engine, with the loads that it must hold, and the cases that load their own.
SHARED: dict[str, Callable[[Sizes], list[Load]]] = {
    "one_stream": lambda sizes: [Load(1, sizes.short_prompt, sizes.answer)],
    "batch": lambda sizes: [Load(sizes.batch, sizes.prompt, sizes.answer)],
    "decode": lambda sizes: [Load(n, sizes.context, sizes.steps + 1) for n in sizes.streams],
    "context": lambda sizes: [Load(8, each, sizes.steps + 1) for each in sizes.contexts],
    "prefill": lambda sizes: [Load(1, sizes.prefill, 1)],
    "first_token": lambda sizes: [Load(1, sizes.prompt, 1)],
    "profile": lambda sizes: [
        Load(n, sizes.prompt, sizes.answer + 4 * sizes.traced_steps) for n in (1, sizes.batch)
    ],
    "crowd": lambda sizes: [sizes.crowd],
}
ALONE = ("load", "dialog", "stall", "kv_cache", "shards", "formats", "blocks")
ON_CPU = ("load", "prefill", "decode", "context", "dialog", "stall", "kv_cache", "shards")
ON_GPU = ("one_stream", "batch", "prefill", "first_token", "profile", "crowd", "formats", "blocks")


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
        """The device's rates: of a CPU measured anew each time, of a GPU once."""
        threads = self.job.settings.get("threads")
        measure = _gpu_rates if self.job.device.type == "cuda" else measure_rates
        return measure(self.job.device, self.job.dtype, cast("int | None", threads))

    def _attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> None:
        self.recorder.attempt(case, measure)
        free_memory()

    def _shared(self, cases: list[str]) -> Iterator[Row]:
        loads = [load for case in cases for load in SHARED[case](self.sizes)]
        at_once = max(load.streams * load.prompt for load in loads)
        # The lengths of a crowd are mixed: an average sequence has half of the longest one's.
        room = max(
            load.streams * (load.prompt + load.answer) // (2 if load is self.sizes.crowd else 1)
            for load in loads
        )
        length = max(load.prompt + load.answer for load in loads)
        streams = max(load.streams for load in loads)
        sized = self.job.sized(streams, length, max(room, length))
        sized = dataclasses.replace(sized, step_tokens=self.sizes.step_tokens or at_once)
        with loaded(sized) as driver:
            for case in cases:
                engine = Loaded(sized, driver, self.rates, self.sizes.rounds)
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
            elif case == "crowd":
                yield from crowd(engine, load, sizes.crowd_steps, sizes.traced_steps)
            elif load.answer == 1:
                yield throughput.first_token(case, engine, load)
            else:
                yield throughput.decode(case, engine, load)

    def _alone(self, case: str) -> Iterator[Row]:
        job, sizes = self.job, self.sizes
        eight = Load(8, sizes.context, sizes.steps + 1)
        wide = dataclasses.replace(job, precision=None, step_tokens=sizes.step_tokens or 2048)
        if case == "load":
            return memory.load_time(job)
        if case == "kv_cache":
            return memory.cache_memory(job, sequences=9, tokens=sizes.prefill // 2)
        if case == "dialog":
            return arrivals.dialog(job, turns=10, user=max(8, sizes.prefill // 8), answer=8)
        if case == "stall":
            return arrivals.stall(job, 8, sizes.context, sizes.long_prompt)
        if case == "shards":
            counts = job.shape.config.shard_counts()
            return shards(job, [n for n in (1, 2, 4) if n <= cores() and n in counts], eight)
        blocks = case == "blocks"
        return variants.side_by_side(
            case,
            variants.block_sizes(wide) if blocks else variants.formats(wide),
            Load(sizes.batch if blocks else 1, sizes.short_prompt, sizes.answer),
            long_prompt=sizes.prefill,
            rounds=sizes.rounds,
            rates=self.rates(),
            add_note=self.recorder.add_note,
        )


@functools.cache
def _gpu_rates(device: torch.device, dtype: str, threads: int | None) -> Rates:
    return measure_rates(device, dtype, threads)


def main(arguments: list[str] | None = None, default_device: str | None = None) -> None:
    args = _parser(default_device).parse_args(arguments)
    cuda = args.device == "cuda"
    preset = PRESETS[args.sizes or ("gpu" if cuda else "cpu")]
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    sizes = dataclasses.replace(preset, **given)
    dtype = args.dtype or ("bfloat16" if cuda else read_host().wide_dtype)
    deadline = time.monotonic() + args.seconds
    failed = False
    for name in args.shapes or ["7B" if cuda else "110M"]:
        shape = SHAPES[name]
        recorder = Recorder(
            "engine",
            args.results,
            {"shape": name, "parameters": shape.parameters},
            part=name,
            deadline=deadline,
            device=torch.cuda.get_device_name() if cuda else "",
        )
        cases = args.cases or (ON_GPU if cuda else ON_CPU)
        device = torch.device(args.device)
        folder = None
        if not cuda or "load" in cases:
            folder = ensure_checkpoint(shape, args.work_dir, device)
        job = Job(
            shape,
            dtype,
            device,
            settings={"threads": args.threads} if args.threads else {},
            ckpt_dir=folder,
        )
        for number, precision in enumerate(
            args.precisions or [dtype, *([] if cuda else ["int8", "int4"])]
        ):
            job = dataclasses.replace(job, precision=precision, dtype=dtype)
            if precision in DTYPES:
                job = dataclasses.replace(job, precision=None, dtype=precision)
            # Each of these has all formats by itself.
            once = () if number else ("formats", "blocks")
            bench = Bench(job, sizes, recorder)
            bench.run(case for case in cases if case in once or case not in ("formats", "blocks"))
        print(recorder.write() / "result.md")
        failed |= recorder.failed
    if failed:
        raise SystemExit(1)


FLAGS = {
    "rounds": "repetitions of each measurement",
    "steps": "decode steps per repetition, of the sweeps and of shards",
    "streams": "numbers of streams of the case decode",
    "context": "tokens that the streams of the case decode begin with",
    "contexts": "tokens that the streams of the case context begin with",
    "prompt": "tokens of the cases batch, first_token and profile",
    "prefill": "tokens of the case prefill",
    "long_prompt": "tokens of the prompt that arrives amid streams",
}


def _parser(device: str | None) -> argparse.ArgumentParser:
    default = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(
        f"python -m bench.{'gpu' if device else 'engine'}", description=__doc__
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=[*SHARED, *ALONE], help="default: those of the device")
    add("--shapes", nargs="+", choices=SHAPES, help="default: 110M, on a GPU 7B")
    add("--precisions", nargs="+", choices=WEIGHT_BYTES, help="formats of the weights")
    add("--dtype", choices=DTYPES, help="of activations; default: bfloat16 where it is fast")
    add("--device", choices=["cuda", "cpu"], default=default, help=f"default: {default}")
    add("--sizes", choices=PRESETS, help="how much each case measures; default: by device")
    for name, text in FLAGS.items():
        many = {"nargs": "+"} if name in ("streams", "contexts") else {}
        add(f"--{name}", type=int, help=text, **many)  # type: ignore[arg-type]
    add("--threads", type=int, help="default: as the engine chooses")
    add("--seconds", type=float, default=float("inf"), help="no case begins later; default: no end")
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps checkpoints between runs")
    add("--results", type=Path, default=RESULTS, help="folder of all results")
    return parser


if __name__ == "__main__":
    main()
