"""Step time on several shards: each count runs in processes of its own, as in production.

This module is also the program that runs on every rank.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bench.engine.driver import Driver, Job
from bench.engine.throughput import Load
from bench.report import Row, SkippedError, spread
from bench.shapes import SHAPES


def shards(job: Job, counts: Iterable[int], load: Load) -> Iterator[Row]:
    """Decode steps on each number of shards; all share the cores."""
    if job.device.type != "cpu":
        raise SkippedError("ranks share one device: --device cpu")
    for count in counts:
        seconds = _measure(job, count, load)
        yield Row(
            "shards",
            {"weights": job.weights, "shards": count, "streams": load.streams},
            spread("step_ms", [1e3 * each for each in seconds]),
        )


def _measure(job: Job, count: int, load: Load) -> list[float]:
    """Seconds of each step. Raises RuntimeError with the processes' output when they fail."""
    asked = {
        "shape": job.shape.name,
        "dtype": job.dtype,
        "precision": job.precision,
        "ckpt_dir": str(job.ckpt_dir) if job.ckpt_dir else None,
        "load": [load.streams, load.prompt, load.answer],
    }
    command = [sys.executable, "-m", "model_service.launcher", f"--shards={count}"]
    command += ["-m", "bench.engine.shards", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{count} shards: {done.stderr[-2000:]}")
    return [float(each) for each in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """One rank: the leader prints the seconds of its steps as JSON, the others follow."""
    asked = json.loads(sys.argv[1])
    load = Load(*asked["load"])
    job = Job(
        SHAPES[asked["shape"]],
        asked["dtype"],
        torch.device("cpu"),
        step_tokens=load.streams * load.prompt,
        precision=asked["precision"],
        ckpt_dir=Path(asked["ckpt_dir"]) if asked["ckpt_dir"] else None,
    )
    replica = job.sized(load.streams, load.prompt + load.answer).load()
    if not replica.is_leader:
        replica.runner.follow()
        return
    driver = Driver(replica)
    trial = driver.answer(driver.prompts([load.prompt] * load.streams), load.answer)
    replica.runner.release_followers()
    print(json.dumps(trial.seconds()[trial.all_decode()]))


if __name__ == "__main__":
    main()
