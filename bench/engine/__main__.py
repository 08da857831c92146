"""`python -m bench.engine`: measures the engine and writes JSON, Markdown and plots."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.checkpoint import ensure_checkpoint
from bench.engine import dialog, memory, shards, stall, throughput
from bench.engine.session import Variant
from bench.engine.throughput import BITS
from bench.host import Host, cores, read_host
from bench.paths import WORK_DIR
from bench.report import RESULTS, Row, line, make_report, result_folder, write_report
from bench.shapes import SHAPES, Shape


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each case measures."""

    rounds: int
    steps: int  # decode steps per round
    prompt: int  # tokens of the prefill case
    long_prompt: int  # tokens of the prompt that arrives amid streams
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    context: int  # tokens that decoding streams begin with


Case = Callable[[Shape, Variant, Sizes], Iterable[Row]]


def _load(_shape: Shape, variant: Variant, _sizes: Sizes) -> Iterator[Row]:
    return memory.load_time(variant)


def _kv_cache(shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return memory.cache_memory(shape, variant, sequences=9, tokens=sizes.prompt // 2)


def _prefill(shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return throughput.prefill(shape, variant, sizes.prompt, sizes.rounds)


def _decode(shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return throughput.decode(
        shape,
        variant,
        sizes.batches,
        context=sizes.context,
        steps=sizes.steps,
        rounds=sizes.rounds,
    )


def _context(_shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return throughput.context_sweep(variant, sizes.contexts, batch=8, steps=sizes.steps)


def _dialog(_shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return dialog.turns(variant, count=10, user=max(8, sizes.prompt // 8), answer=8)


def _stall(_shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    return stall.long_prompt(variant, 8, sizes.context, sizes.long_prompt)


def _shards(shape: Shape, variant: Variant, sizes: Sizes) -> Iterator[Row]:
    counts = [n for n in (1, 2, 4) if n <= cores() and not shape.config.indivisible_by(n)]
    return shards.shard_sweep(variant, counts, 8, sizes.context, sizes.steps)


CASES: dict[str, Case] = {
    "load": _load,
    "prefill": _prefill,
    "decode": _decode,
    "context": _context,
    "dialog": _dialog,
    "stall": _stall,
    "kv_cache": _kv_cache,
    "shards": _shards,
}


def main(arguments: list[str] | None = None) -> None:
    host = read_host()
    args = _parser(host).parse_args(arguments)
    sizes = Sizes(
        args.rounds,
        args.steps,
        args.prompt,
        args.long_prompt,
        tuple(args.streams),
        tuple(args.contexts),
        args.context,
    )
    for name in args.shapes:
        shape = SHAPES[name]
        folder = ensure_checkpoint(shape, args.work_dir)
        variants = [_variant(each, folder, args.threads, host) for each in args.precisions]
        rows = measure(shape, variants, args.cases, sizes)
        details = {"shape": name, "parameters": shape.parameters}
        report = make_report("engine", rows, (), details)
        folder = result_folder(report, args.results) / name
        write_report(report, folder)
        if not args.no_plots:
            from bench.engine.plots import plot_engine  # noqa: PLC0415  # needs the extra `bench`

            plot_engine(report, folder)
        print(folder / "result.md")


def measure(
    shape: Shape, variants: Iterable[Variant], cases: Iterable[str], sizes: Sizes
) -> list[Row]:
    """All rows, told on stderr as they come."""
    rows: list[Row] = []
    cases = tuple(cases)
    for variant in variants:
        for case in cases:
            for row in CASES[case](shape, variant, sizes):
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
    return rows


def _variant(precision: str, ckpt_dir: Path, threads: int | None, host: Host) -> Variant:
    """Quantized weights are multiplied with activations of the machine's widest useful type."""
    if precision in ("int8", "int4"):
        return Variant(ckpt_dir, host.wide_dtype, threads, precision)
    return Variant(ckpt_dir, precision, threads)


def _parser(host: Host) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.engine", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["110M"])
    add("--precisions", nargs="+", choices=BITS, default=[host.wide_dtype, "int8", "int4"])
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--rounds", type=int, default=3, help="repetitions of prefill and of each decode batch")
    add("--steps", type=int, default=32, help="decode steps per repetition")
    add("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--context", type=int, default=32, help="tokens that decoding streams begin with")
    add("--contexts", type=int, nargs="+", default=[16, 128, 256, 512, 1024])
    add("--prompt", type=int, default=512, help="tokens of the prefill case")
    add("--long_prompt", type=int, default=4000, help="tokens of the prompt amid streams")
    add("--threads", type=int, help="default: as the engine chooses")
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps checkpoints between runs")
    add("--results", type=Path, default=RESULTS)
    add("--no-plots", action="store_true", help="do without matplotlib (extra `bench`)")
    return parser


if __name__ == "__main__":
    main()
