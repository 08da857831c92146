"""Progress bars of `chasqui serve` on a terminal: how far each replica has loaded its weights.

The services write to pipes, so they log it as lines, which this turns into a bar.
"""

import re
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from chasqui.cli.serve.service_log import event

_LOADING = re.compile(r"loading weights: (\d+) %")


class LoadingBars:
    """One bar for each service that loads weights; all disappear when the last one is full."""

    def __init__(self) -> None:
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description} loads its weights"),
            BarColumn(),
            TaskProgressColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def on_line(self, service: str, line: str) -> bool:
        """Whether a log line of `service` says how far it is, and is shown by its bar."""
        found = _LOADING.fullmatch(event(line))
        if found is None:
            return False
        if service not in self._bars:
            self._bars[service] = self._progress.add_task(service, total=100)
            self._progress.start()
        self._progress.update(self._bars[service], completed=int(found[1]))
        if self._progress.finished:
            self.close()
        return True

    def echo(self, text: str) -> None:
        """Writes a line to stderr, above the bars."""
        if self._progress.live.is_started:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        """Removes the bars."""
        self._progress.stop()
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._bars.clear()


def on_terminal() -> bool:
    """Whether stderr shows bars."""
    return sys.stderr is not None and sys.stderr.isatty()
