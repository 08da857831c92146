"""What the engine gets out of one GPU, beside what the card can do: python -m bench.gpu

First the card's copy bandwidth and matrix rate are measured, then engines on random weights that
are made on the device, and the services on such weights from a file. Results are written after
every case, to <results>/<date>-<device>/gpu/. With --device cpu and --shape tiny every line that
needs no GPU runs in seconds, to see that the program is whole.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.engine.crowd import crowd
from bench.engine.driver import Driver, Job, loaded
from bench.engine.roofline import Card, Network
from bench.engine.trace import profile_steps
from bench.engine.variants import formats, larger
from bench.gpu import cases
from bench.gpu.blocks import block_sizes
from bench.gpu.card import describe, measure_card
from bench.gpu.day import day
from bench.gpu.huggingface import transformers_rows
from bench.gpu.recorder import Recorder, SkippedError
from bench.gpu.services import prepare, through_services
from bench.gpu.sizes import FULL, SMALL, Sizes
from bench.paths import WORK_DIR
from bench.report import RESULTS, Row, table
from bench.shapes import SHAPES
from chasqui.cli.serve.supervisor import in_background
from model_service.loading.precision import DTYPES

OF_ENGINE = ("one_stream", "batch", "prefill", "first_token", "profile", "crowd")
OF_SERVICES = ("service", "day")
LARGER = {"13B": None, "70B": "int8"}
CASES = (*OF_ENGINE, *OF_SERVICES, "formats", "blocks", *LARGER, "transformers")


@dataclass(frozen=True, slots=True)
class Bench:
    """One run."""

    job: Job
    sizes: Sizes
    work_dir: Path
    chosen: frozenset[str]
    recorder: Recorder

    def attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> bool:
        """Runs a case if it was asked for."""
        return case in self.chosen and self.recorder.attempt(case, measure)


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    sizes = FULL if cuda else SMALL
    sizes = replace(sizes, rounds=args.rounds or sizes.rounds)
    details = {**describe(device), "shape": args.shape, "seconds": {}}
    recorder = Recorder(args.results, details, time.monotonic() + args.seconds)
    job = Job(
        SHAPES[args.shape],
        args.dtype or ("bfloat16" if cuda else "float32"),
        device,
        sequences=max(sizes.crowd, sizes.streams),
        length=sizes.length,
        tokens=sizes.tokens,
        step_tokens=sizes.step_tokens,
    )
    bench = Bench(job, sizes, args.work_dir, frozenset(args.cases), recorder)
    cards: list[Card] = []
    if recorder.attempt("card", lambda: _card(job, cards)):
        measure(bench, cards[0])
    if not args.no_plots:
        from bench.engine.plots import plot_gpu  # noqa: PLC0415  # needs the extra `bench`

        plot_gpu(recorder.report(), recorder.folder)
    if targets := recorder.targets():
        print(table([{**row.settings, **row.values} for row in targets]))
    print(recorder.folder / "result.md")
    if recorder.failed:
        raise SystemExit(1)


def measure(bench: Bench, card: Card) -> None:
    """All chosen cases; those that need the same engine or services have them in common."""
    recorder, job, sizes = bench.recorder, bench.job, bench.sizes
    if bench.chosen.intersection(OF_ENGINE):
        recorder.attempt("engine", lambda: _of_engine(bench, card))
    if bench.chosen.intersection(OF_SERVICES):
        recorder.attempt("services", lambda: _of_services(bench))
    bench.attempt("formats", lambda: formats(job, card, sizes, recorder.note))
    bench.attempt("blocks", lambda: block_sizes(job, sizes))
    for name, precision in LARGER.items():
        large = replace(job, shape=SHAPES[name], precision=precision)
        bench.attempt(name, lambda large=large: _larger(large, card, sizes))  # type: ignore[misc]
    bench.attempt("transformers", lambda: transformers_rows(job, sizes, recorder.note))


def _card(job: Job, cards: list[Card]) -> Iterator[Row]:
    card = measure_card(job.device, (DTYPES[job.dtype],))
    cards.append(card)
    yield Row(
        "card",
        {"device": str(describe(job.device)["device"])},
        {
            "copy_gb_per_s": card.copy / 1e9,
            "read_gb_per_s": card.read / 1e9,
            **{f"{name}_tflop_per_s": rate / 1e12 for name, rate in card.matrix.items()},
        },
    )


def _of_engine(bench: Bench, card: Card) -> Iterable[Row]:
    job, sizes = bench.job, bench.sizes
    network = Network(job.shape, job.dtype, 4 if job.dtype == "float32" else 2)
    with loaded(job) as driver:
        ask: dict[str, Callable[[Driver], Iterator[Row]]] = {
            "one_stream": lambda it: cases.one_stream(it, network, card, sizes),
            "batch": lambda it: cases.batch(it, network, card, sizes),
            "prefill": lambda it: cases.prefill(it, network, card, sizes),
            "first_token": lambda it: cases.first_token(it, network, card, sizes),
            "profile": lambda it: profile_steps(it, sizes, job.device),
            "crowd": lambda it: crowd(it, network, card, sizes, job.device),
        }
        for name in OF_ENGINE:
            bench.attempt(name, lambda name=name: ask[name](driver))  # type: ignore[misc]
            driver.clear()
    return ()


def _of_services(bench: Bench) -> Iterator[Row]:
    ground, row = prepare(bench.job, bench.sizes, bench.work_dir)
    yield row
    with in_background(ground.deployment(), log=lambda _name, _line: None) as address:
        bench.attempt("service", lambda: through_services(address, ground, bench.sizes))
        bench.attempt("day", lambda: day(address, bench.job.sequences, bench.sizes))


def _larger(job: Job, card: Card, sizes: Sizes) -> Iterator[Row]:
    if job.device.type != "cuda":
        raise SkippedError("needs CUDA")
    yield from larger(job, card, sizes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--shape", choices=SHAPES, default="7B", help="of all cases but 13B and 70B (default: 7B)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="of activations and cache; default: bfloat16 on CUDA")
    add("--rounds", type=int, help="repetitions of each measurement (default: 3 on CUDA)")
    add(
        "--seconds",
        type=float,
        default=480.0,
        help="no case is begun that long after the start (default: 480)",
    )
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps the checkpoint of the services")
    add("--results", type=Path, default=RESULTS, help="folder of all results")
    add("--no-plots", action="store_true", help="do without matplotlib (extra `bench`)")
    return parser


if __name__ == "__main__":
    main()
