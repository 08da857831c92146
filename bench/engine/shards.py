"""Step time on several shards: each count runs in processes of its own, as in production.

This module is also the program that runs on every rank.
"""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from bench.engine.driver import Driver, Job, Load
from bench.report import Row, SkippedError, spread


def shards(job: Job, counts: Iterable[int], load: Load) -> Iterator[Row]:
    """Decode steps on each number of shards; all share the cores.

    Raises:
        RuntimeError: the processes failed; the message is the last line of their output.
    """
    if job.device.type != "cpu":
        raise SkippedError("ranks share one device: --device cpu")
    sized = job.sized(load.streams, load.prompt + load.answer)
    asked = pickle.dumps((replace(sized, step_tokens=load.streams * load.prompt), load)).hex()
    for count in counts:
        command = [sys.executable, "-m", "model_service.launcher", f"--shards={count}"]
        command += ["-m", "bench.engine.shards", asked]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"{count} shards: {reason}")
        seconds = json.loads(done.stdout.splitlines()[-1])
        yield Row(
            "shards",
            {"weights": job.weights, "shards": count, "streams": load.streams},
            spread("step_ms", [1e3 * each for each in seconds]),
        )


def main(asked: str) -> None:
    """One rank: the leader prints the seconds of its steps as JSON, the others follow."""
    job, load = pickle.loads(bytes.fromhex(asked))  # noqa: S301  # by `shards`
    replica = job.load()
    if not replica.is_leader:
        replica.runner.follow()
        return
    trial = Driver(replica).answer_load(load)
    replica.runner.release_followers()
    print(json.dumps(trial.seconds()[trial.all_decode()]))


if __name__ == "__main__":
    main(sys.argv[1])
