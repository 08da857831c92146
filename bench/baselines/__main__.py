"""Compares engines on the same weights, in interleaved rounds."""

import argparse
from functools import partial

import psutil
import torch

from bench.baselines.comparison import Comparison, parse_case
from bench.baselines.contenders import CONTENDERS, default_names
from bench.checkpoint import ensure_checkpoint
from bench.report import Recorder, command_parser, finish, read_host
from bench.shapes import SHAPES


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    finish(*[_compare(name, args) for name in args.shapes])


def _compare(name: str, args: argparse.Namespace) -> Recorder:
    shape, host = SHAPES[name], read_host(args.device)
    ckpt_dir = ensure_checkpoint(shape, args.work_dir, torch.device(args.device))
    comparison = Comparison(shape, ckpt_dir, host, args)
    details = {"shape": name, "contenders": comparison.infos}
    recorder = Recorder("baselines", args.results, details, name, host)
    recorder.add_note(
        f"{name}: {shape.parameters / 1e6:.0f}M parameters, random weights. {args.rounds} "
        "rounds, contenders in shuffled order; medians, lowest and highest. decode-B: B "
        f"sequences of {args.context} tokens, {args.steps} steps. `over chasqui`: ratio of "
        "medians to Chasqui with as many bits per weight. Only these ratios are claims."
    )
    names = args.contenders or default_names(host)
    recorder.attempt("comparison", partial(comparison.run, names))
    return recorder


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("baselines", __doc__, default_device="cpu")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["110M"])
    add("--rounds", type=int, default=5)
    cases = [parse_case(name) for name in ("prefill-512", "decode-1", "decode-8", "decode-32")]
    add("--cases", nargs="+", type=parse_case, default=cases, help="prefill-N or decode-N")
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: those for this machine")
    add("--context", type=int, default=32, help="tokens that decoding sequences begin with")
    add("--steps", type=int, default=16, help="decode steps of a measurement")
    free = psutil.virtual_memory().available / 2**30
    add("--memory", type=float, default=0.6 * free, help="GiB of all loaded workers together")
    return parser


if __name__ == "__main__":
    main()
