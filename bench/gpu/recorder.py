"""Keeps what a run finds out, and writes it after every case: a run that is cut off loses one case.

A case that fails is a note in the result, not the end of the run: time on the card is short, and
the other cases are as good as before.
"""

import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.engine.driver import free_memory
from bench.gpu.targets import TARGET_SHAPE, against_targets
from bench.report import Report, Row, line, make_report, write_report
from serving.errors import StartError


class SkippedError(Exception):
    """A case that cannot be measured here; the message says why."""


class Recorder:
    """The rows and notes of one run."""

    def __init__(self, root: Path, details: dict[str, object], deadline: float) -> None:
        """A case that would begin after `deadline`, by time.monotonic, is not begun."""
        self.details = details
        self.failed = False
        self._deadline = deadline
        self._rows: list[Row] = []
        self._notes: list[str] = []
        slug = re.sub(r"[^a-z0-9]+", "-", str(details["device"]).lower()).strip("-")
        created = self.report().created[:10]
        self.folder = root / f"{created}-{slug}" / "gpu"

    def targets(self) -> list[Row]:
        """What the run was to reach, as far as it got."""
        return [*against_targets(self._rows)] if self.details["shape"] == TARGET_SHAPE else []

    def report(self) -> Report:
        """All that is known so far."""
        rows = [*self.targets(), *self._rows]
        return make_report("gpu", rows, self._notes, self.details)

    def note(self, text: str) -> None:
        self._notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> bool:
        """Runs a case and writes what it found. Returns whether it came to its end."""
        if time.monotonic() > self._deadline:
            self.note(f"{case}: not begun: the time of this run was over (--seconds)")
            write_report(self.report(), self.folder)
            return False
        started, complete = time.monotonic(), False
        try:
            for row in measure():
                self._rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
            complete = True
        except (SkippedError, StartError) as error:
            self.note(f"{case}: skipped: {error}")
        except Exception as error:  # whatever it is, the other cases are measured
            traceback.print_exc()
            reason = str(error).partition("\n")[0]
            self.note(f"{case}: failed: {type(error).__name__}: {reason}")
            self.failed = True
        free_memory()
        seconds = round(time.monotonic() - started, 1)
        print(f"{case}: {seconds} s", file=sys.stderr, flush=True)
        self.details.setdefault("seconds", {})[case] = seconds  # type: ignore[index]
        write_report(self.report(), self.folder)
        return complete
