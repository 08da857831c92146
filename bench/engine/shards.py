"""Step time on several shards: each count runs in processes of its own, as in production.

This module is also the program that runs on every rank.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.engine.session import Session, Variant
from bench.report import Row
from bench.summary import Summary, summarize
from model_service.loading.load_replica import load_replica


def shard_sweep(
    variant: Variant, counts: Iterable[int], batch: int, context: int, steps: int
) -> Iterator[Row]:
    """Decode steps of `batch` streams on each number of shards; all share the cores."""
    for count in counts:
        step = _measure(variant, count, batch, context, steps)
        yield Row(
            "shards",
            {"precision": variant.precision, "shards": count, "streams": batch, "context": context},
            {
                "step_ms": step.median * 1e3,
                "step_ms_low": step.low * 1e3,
                "step_ms_high": step.high * 1e3,
            },
        )


def _measure(variant: Variant, shards: int, batch: int, context: int, steps: int) -> Summary:
    """Raises RuntimeError with the processes' output when they fail."""
    command = [sys.executable, "-m", "model_service.launcher", f"--shards={shards}"]
    command += ["-m", "bench.engine.shards"]
    command += [str(variant.ckpt_dir), variant.dtype, variant.quantize or ""]
    command += [str(number) for number in (batch, context, steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shards} shards: {done.stderr[-2000:]}")
    return summarize(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """One rank: the leader prints the seconds of its steps as JSON, the others follow."""
    parser = argparse.ArgumentParser()
    for name in ("ckpt_dir", "dtype", "quantize"):
        parser.add_argument(name)
    for name in ("batch", "context", "steps"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    variant = Variant(Path(args.ckpt_dir), args.dtype, quantize=args.quantize or None)
    length = args.context + args.steps + 2
    at_once = {"max_step_tokens": args.batch * args.context}
    replica = load_replica(variant.options(args.batch, length, settings=at_once))
    if not replica.is_leader:
        replica.runner.follow()
        return
    run = Session(replica)
    run.fill(run.prompts(args.batch, args.context), args.steps + 2)
    seconds = [run.step().seconds for _ in range(args.steps)]
    replica.runner.release_followers()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
