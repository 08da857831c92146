"""A progress bar on stderr for work that takes longer than a second; none where stderr is no
terminal.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

DELAY = 1.0  # seconds; shorter work is over before a bar can be read

Advance = Callable[[int], None]


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A bar for `total` bytes of work.

    Yields the function to call with the bytes that are done, from any thread. The bar disappears at
    the end.
    """
    # Shards of a model share the terminal, and do the same at the same time.
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _done: None
        return
    bar = _DelayedBar(label, total)
    try:
        yield bar.advance
    finally:
        bar.stop()


class _DelayedBar:
    """A bar that appears with the first advance after `DELAY`."""

    def __init__(self, label: str, total: int) -> None:
        self._progress = make_progress()
        self._task = self._progress.add_task(label, total=total)
        self._appears_at = time.monotonic() + DELAY
        self._lock = threading.Lock()
        self._shown = False

    def advance(self, done: int) -> None:
        with self._lock:
            self._progress.advance(self._task, done)
            if not self._shown and time.monotonic() >= self._appears_at:
                self._shown = True
                self._progress.start()

    def stop(self) -> None:
        if self._shown:
            self._progress.stop()


def make_progress() -> Progress:
    """A bar for bytes on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
