"""Progress bars appear on a terminal, and nowhere else."""

import os
import subprocess
import sys

VERIFYING = """
from serving.telemetry import progress
progress.DELAY = 0.0
with progress.progress("verifying", 100) as advance:
    advance(40)
    advance(60)
"""


def run_on_terminal(program: str) -> str:
    """All that a program writes to stderr, which is a terminal."""
    reader, writer = os.openpty()
    with subprocess.Popen([sys.executable, "-c", program], stderr=writer) as process:
        os.close(writer)
        written = b""
        while piece := _read(reader):
            written += piece
    os.close(reader)
    assert process.returncode == 0, written
    return written.decode()


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 4096)
    except OSError:  # the program has ended
        return b""


def test_long_work_has_a_bar_on_a_terminal() -> None:
    assert "verifying" in run_on_terminal(VERIFYING)


def test_short_work_has_none() -> None:
    assert not run_on_terminal(VERIFYING.replace("0.0", "3600.0"))


def test_a_pipe_stays_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", VERIFYING], capture_output=True, check=True)
    assert done.stderr == b""


def test_bars_of_replicas_follow_their_log_lines() -> None:
    shown = run_on_terminal(
        "from chasqui.cli.serve.loading_bars import LoadingBars\n"
        "bars = LoadingBars()\n"
        'line = \'{"event": "loading weights: %d %%", "level": "info"}\'\n'
        "assert bars.on_line('model-1', line % 40)\n"
        "assert not bars.on_line('model-1', '{\"event\": \"listening\"}')\n"
        "bars.echo('tokenizer | listening')\n"
        "assert bars.on_line('model-1', line % 100)\n"
        "bars.echo('gateway | listening')\n"
    )
    assert "model-1 loads its weights" in shown
    assert "tokenizer | listening" in shown
    assert "gateway | listening" in shown
