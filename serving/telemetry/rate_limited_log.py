"""Log lines that others can cause at will: told at once, and then no faster than a pace."""

import threading
import time
from collections.abc import Callable

import structlog


class RateLimitedLog:
    """Tells the first of its kind, and after each pause how many more there were; thread-safe."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._next = -float("inf")
        self._untold = 0

    def warn(self, log: structlog.stdlib.BoundLogger, event: str, **values: str) -> None:
        with self._lock:
            if self._clock() < self._next:
                self._untold += 1
                return
            suppressed, self._untold = self._untold, 0
            self._next = self._clock() + self._seconds
        log.warning(event, **values, suppressed=suppressed)
