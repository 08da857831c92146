"""`python -m bench.baselines`: compares engines in interleaved rounds, writes tables and plots."""

import argparse
from pathlib import Path

import psutil

from bench.baselines.comparison import Comparison, Plan
from bench.baselines.contenders import CONTENDERS, default_names
from bench.baselines.rounds import parse_case
from bench.checkpoint import ensure_checkpoint
from bench.host import Host, read_host
from bench.paths import WORK_DIR
from bench.report import RESULTS, Report, make_report, result_folder, write_report
from bench.shapes import SHAPES


def main(arguments: list[str] | None = None) -> None:
    host = read_host()
    args = _parser(host).parse_args(arguments)
    for name in args.shapes:
        shape = SHAPES[name]
        plan = Plan(
            shape=shape,
            ckpt_dir=ensure_checkpoint(shape, args.work_dir),
            work_dir=args.work_dir,
            host=host,
            cases=tuple(args.cases),
            rounds=args.rounds,
            context=args.context,
            steps=args.steps,
            memory=int(args.memory * 2**30),
        )
        comparison = Comparison(plan)
        comparison.run(args.contenders)
        report = baselines_report(comparison)
        folder = result_folder(report, args.results) / name
        write_report(report, folder)
        if not args.no_plots:
            from bench.engine.plots import plot_baselines  # noqa: PLC0415  # needs the extra `bench`

            plot_baselines(report, folder)
        print(folder / "result.md")


def baselines_report(comparison: Comparison) -> Report:
    """The comparison as a result file."""
    plan = comparison.plan
    notes = [
        f"{plan.shape.name}: {plan.shape.parameters / 1e6:.0f}M parameters, random weights. "
        f"{plan.rounds} rounds, contenders in shuffled order; medians, lowest and highest. "
        f"decode-B: B sequences of {plan.context} tokens, {plan.steps} steps.",
        "`over chasqui`: ratio of medians within this run, to Chasqui with as many bits per "
        "weight. Nothing else here may be compared with another run.",
    ]
    details = {
        "shape": plan.shape.name,
        "parameters": plan.shape.parameters,
        "contenders": comparison.infos,
        "rates": [
            {"case": case, "contender": contender, "tokens_per_s": values}
            for (case, contender), values in comparison.rates.items()
        ],
    }
    return make_report("baselines", comparison.rows(), notes, details)


def _parser(host: Host) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.baselines", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["110M"])
    add("--rounds", type=int, default=5)
    cases = [parse_case(name) for name in ("prefill-512", "decode-1", "decode-8", "decode-32")]
    add("--cases", nargs="+", type=parse_case, default=cases, help="prefill-N or decode-N")
    add("--contenders", nargs="+", choices=CONTENDERS, default=default_names(host))
    add("--context", type=int, default=32, help="tokens that decoding sequences begin with")
    add("--steps", type=int, default=16, help="decode steps of a measurement")
    free = psutil.virtual_memory().available / 2**30
    add("--memory", type=float, default=0.6 * free, help="GiB that loaded workers may take")
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps environments and models")
    add("--results", type=Path, default=RESULTS)
    add("--no-plots", action="store_true", help="do without matplotlib (extra `bench`)")
    return parser


if __name__ == "__main__":
    main()
