"""The safety service as its operator starts it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Starts `python -m safety_service` with these flags."""
    command = [sys.executable, "-m", "safety_service", "--log_format=json", "--port=0"]
    with ExitStack() as stack:

        def launch(*flags: str | Path) -> "subprocess.Popen[str]":
            arguments = [*command, *map(str, flags)]
            process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield launch


@pytest.fixture(scope="session")
def target(launch: Launch) -> str:
    """The address of one that judges by the rules that ship."""
    process = launch()
    assert process.stderr is not None
    for line in process.stderr:
        if (entry := json.loads(line))["event"] == "listening":
            return str(entry["address"])
    raise AssertionError
