"""Compares engines on the same weights, in interleaved rounds: python -m bench.baselines"""

import argparse
import sys
from functools import partial
from pathlib import Path

import psutil
import torch

from bench.baselines.comparison import Comparison, Plan, parse_case
from bench.baselines.contenders import CONTENDERS, default_names
from bench.checkpoint import ensure_checkpoint
from bench.report import RESULTS, WORK_DIR, Recorder, read_host
from bench.shapes import SHAPES


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    host, cuda = read_host(), args.device == "cuda"
    failed = False
    for name in args.shapes:
        shape = SHAPES[name]
        plan = Plan(
            shape=shape,
            ckpt_dir=ensure_checkpoint(shape, args.work_dir, torch.device(args.device)),
            work_dir=args.work_dir,
            host=host,
            device=args.device,
            cases=tuple(args.cases),
            rounds=args.rounds,
            context=args.context,
            steps=args.steps,
            memory=int(args.memory * 2**30),
        )
        comparison = Comparison(plan, lambda line: print(line, file=sys.stderr, flush=True))
        recorder = Recorder(
            "baselines",
            args.results,
            {"shape": name, "contenders": comparison.infos},
            part=name,
            device=torch.cuda.get_device_name() if cuda else "",
        )
        recorder.add_note(
            f"{name}: {shape.parameters / 1e6:.0f}M parameters, random weights. {plan.rounds} "
            "rounds, contenders in shuffled order; medians, lowest and highest. decode-B: B "
            f"sequences of {plan.context} tokens, {plan.steps} steps. `over chasqui`: ratio of "
            "medians to Chasqui with as many bits per weight. Only these ratios are claims."
        )
        names = args.contenders or default_names(host, args.device)
        recorder.attempt("comparison", partial(comparison.run, names))
        print(recorder.write() / "result.md")
        failed |= recorder.failed
    if failed:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.baselines", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["110M"])
    add("--rounds", type=int, default=5)
    cases = [parse_case(name) for name in ("prefill-512", "decode-1", "decode-8", "decode-32")]
    add("--cases", nargs="+", type=parse_case, default=cases, help="prefill-N or decode-N")
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: those for this machine")
    add("--device", choices=["cuda", "cpu"], default="cpu")
    add("--context", type=int, default=32, help="tokens that decoding sequences begin with")
    add("--steps", type=int, default=16, help="decode steps of a measurement")
    free = psutil.virtual_memory().available / 2**30
    add("--memory", type=float, default=0.6 * free, help="GiB that loaded workers may hold")
    add("--work_dir", type=Path, default=WORK_DIR, help="keeps environments and models")
    add("--results", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
