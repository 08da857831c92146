"""Warnings that a client can cause at will, limited in rate so that they cannot fill the disk."""

import threading
import time
from collections.abc import Callable

import structlog


class RateLimitedLog:
    """Logs the first warning, then at most one every `seconds`, with the number of those between.

    Thread-safe.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._next = -float("inf")
        self._suppressed = 0

    def warn(self, log: structlog.stdlib.BoundLogger, event: str, **values: str) -> None:
        with self._lock:
            if self._clock() < self._next:
                self._suppressed += 1
                return
            suppressed, self._suppressed = self._suppressed, 0
            self._next = self._clock() + self._seconds
        log.warning(event, **values, suppressed=suppressed)
