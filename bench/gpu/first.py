"""python -m bench.gpu first: the most important facts about a new GPU, in at most 400 seconds.

Each part is a process of its own with its own bound, so that the failure of one costs the others
nothing. It prints as it goes, and its output is also kept in a file.
"""

import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from bench.gpu.check import ROOT
from bench.report import RESULTS, versions

SECONDS = 400
_PYTHON = (sys.executable, "-m")
_ENGINE = (*_PYTHON, "bench.gpu", "--rounds", "2")
# Name, seconds at most, command; in the order of weight. The benchmark's own limit, after which it
# begins no case, leaves time for the last one.
PARTS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("machine", 15, ("nvidia-smi",)),
    ("check", 140, (*_PYTHON, "bench.gpu", "check", "-k", "not fp8")),
    ("one_stream", 90, (*_ENGINE, "--cases", "one_stream", "profile")),
    ("engine", 155, (*_ENGINE, "--cases", "batch", "prefill", "first_token", "--seconds", "110")),
)


def main(arguments: list[str]) -> None:
    """Exit status 1 if a part failed or ran out of time."""
    parser = ArgumentParser("python -m bench.gpu first", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all results")
    folder: Path = parser.parse_args(arguments).results
    folder.mkdir(parents=True, exist_ok=True)
    print(versions(), flush=True)
    statuses = [_run(name, limit, command, folder) for name, limit, command in PARTS]
    raise SystemExit(any(statuses))


def _run(name: str, limit: int, command: tuple[str, ...], folder: Path) -> int:
    """The status of one part, 124 if it ran out of time."""
    if "--cases" in command:
        command = (*command, "--results", str(folder / name))
    print(f"=== {name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    script = 'set -o pipefail; timeout -k 5 "$0" "${@:2}" 2>&1 | tee "$1"'
    log = str(folder / f"{name}.log")
    status = subprocess.run(
        ["bash", "-c", script, str(limit), log, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        check=False,
    ).returncode
    print(f"=== {name}: status {status} after {time.monotonic() - started:.0f} s", flush=True)
    return status
