"""A semaphore for work of known cost, which callers who wait for it share fairly.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): each piece of work starts, in virtual time,
where its caller's last one ended, and the earliest start goes first. A caller that was idle starts
at the current virtual time, so it keeps no credit. The cost must be known in advance;
`gateway.admission.fair_queue` is for generations, whose cost is only known at their end.
"""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSemaphore:
    """Admits work that costs at most `capacity` together, or one larger piece alone.

    Not thread-safe: belongs to one event loop.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._running = 0
        self._now = 0.0  # virtual time: the start of the last work admitted
        self._ends: dict[str, float] = {}  # by caller: where its last piece of work ends
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, int, asyncio.Future[None]]] = []  # a heap
        self._cancelled = 0  # entries of the heap

    @property
    def running(self) -> int:
        """The cost of the work that runs now."""
        return self._running

    @asynccontextmanager
    async def acquire(self, caller: str, cost: int, weight: float = 1.0) -> AsyncIterator[None]:
        """Waits until the work may run, and counts its cost until the end of the block."""
        start = max(self._now, self._ends.get(caller, 0.0))
        self._ends[caller] = start + cost / weight
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (start, next(self._order), cost, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self._running -= cost
            else:
                granted.cancel()
                self._cancelled += 1
                self._drop_cancelled()
            self._grant()

    def _drop_cancelled(self) -> None:
        """Keeps cancelled entries from accumulating while long work runs."""
        if 2 * self._cancelled > len(self._waiting):
            self._waiting = [each for each in self._waiting if not each[3].cancelled()]
            heapq.heapify(self._waiting)
            self._cancelled = 0

    def _grant(self) -> None:
        while self._waiting:
            start, _, cost, granted = self._waiting[0]
            if granted.cancelled():
                self._cancelled -= 1
            else:
                if self._running and self._running + cost > self._capacity:
                    return  # smaller work must not overtake it, or it might never run
                self._now = start
                self._running += cost
                granted.set_result(None)
            heapq.heappop(self._waiting)
        if not self._running:
            self._now = 0.0
            self._ends.clear()
