"""The start of a process of the model service that looks at this machine or at a model."""

import subprocess
import sys


def start_probe(*command: str) -> subprocess.Popen[str]:
    """`python -m model_service.offline` with this command, whose output is read as text."""
    return subprocess.Popen(  # noqa: S603  # our own module
        [sys.executable, "-m", "model_service.offline", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
