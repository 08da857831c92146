"""A service that runs as a child process of `chasqui serve`."""

import asyncio
import contextlib
import os
import signal
import time
from asyncio import Future
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable
from typing import cast

from chasqui.cli.serve.service_log import (
    failure,
    http_address,
    is_error,
    listening_address,
    readable,
)

LINES_KEPT = 200
# A replica that ran for this many seconds counts as started well: its failures are counted anew.
SETTLED = 60.0
# Seconds to wait for a killed process. Only one that hangs in the kernel takes longer.
KILLED_SECONDS = 5.0

Log = Callable[[str, str], None]


class ServiceProcess:
    """A child process whose log is read.

    `address` is set when it listens, `http_address` before that if it serves HTTP, `complaint` when
    it has logged an error, and `ended` is done when the process has ended.
    """

    def __init__(
        self, name: str, process: Process, log: Log, on_end: Callable[["ServiceProcess"], None]
    ) -> None:
        self.address: Future[str] = asyncio.get_running_loop().create_future()
        self.http_address: str | None = None
        self.complaint: Future[str] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.create_task(self._follow(log, on_end))
        self.name = name
        self.earlier_failures = 0  # consecutive failures of the processes that it replaces
        self._started_at = time.monotonic()
        self._process = process
        self._asked_to_end = False
        self._killed_because = ""
        self._killed_at_end = False
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)

    def obituary(self) -> str:
        """The sentence that says how and why the process ended."""
        if self._killed_because:
            return f"{self.name} was killed, because {self._killed_because}"
        reason = failure(list(self._lines))
        return f"{self.name} {_end(cast('int', self._process.returncode))}: {reason}"

    @property
    def failures_in_a_row(self) -> int:
        """Consecutive failures, the end of this process included."""
        settled = time.monotonic() - self._started_at > SETTLED
        return 1 if settled else self.earlier_failures + 1

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end and still runs."""
        return self._asked_to_end and not self.ended.done()

    @property
    def killed_at_end(self) -> bool:
        """Whether it had to be killed when the services were stopped."""
        return self._killed_at_end and self._process.returncode in (None, -signal.SIGKILL)

    def kill_at_end(self, reason: str) -> None:
        """Kills it while the services are stopped, unless it has ended."""
        if not self.ended.done():
            self._killed_at_end = True
            self.kill(reason)

    def kill(self, reason: str) -> None:
        self._killed_because = reason
        self._signal(signal.SIGKILL)

    async def stop(self, seconds: float) -> None:
        """Asks it to end, and kills it if it has not ended after `seconds`."""
        self._asked_to_end = True
        self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self.ended}, timeout=seconds)
        if not done:
            self.kill_at_end(f"it did not end within {seconds:g} seconds")
            await asyncio.wait({self.ended}, timeout=KILLED_SECONDS)

    def _signal(self, signum: signal.Signals) -> None:
        # asyncio's send_signal would reap a process that has just ended, and lose its status.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signum)

    async def _follow(self, log: Log, on_end: Callable[["ServiceProcess"], None]) -> None:
        async for line in cast("asyncio.StreamReader", self._process.stdout):
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            log(self.name, text)
            self.http_address = self.http_address or http_address(text)
            address = listening_address(text)
            if address is not None and not self.address.done():
                self.address.set_result(address)
            if is_error(text) and not self.complaint.done():
                self.complaint.set_result(readable(text))
        await self._process.wait()
        on_end(self)


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # most real-time signals have no name
        return f"was killed by signal {-status}"
