"""The bound on what waits for a client to read. A client that stops reading blocks the task that
writes to it, so that is interrupted: everything it holds is given back there and then, and not when
the client cares to read on.
"""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from gateway.generation import Outcome
from serving.errors import RequestError, resource_exhausted

Place = TypeVar("Place")


class UnreadEvents(Generic[Place]):
    """A queue of at most `max_bytes`, counted as they came over the wire.

    Belongs to the task that makes it, which takes the events. When they are too many, that task is
    cancelled; `close` turns that into the error it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._events: deque[tuple[Place, Outcome]] = deque()
        self._arrived = asyncio.Event()
        self._task = asyncio.current_task()
        self._overrun = False
        self._closed = False

    def put(self, place: Place, event: Outcome) -> None:
        if self._closed or self._overrun:
            return
        self._bytes += _size(event)
        if self._bytes > self._max_bytes and self._task is not None:
            self._overrun = True
            self._events.clear()
            self._task.cancel()
            return
        self._events.append((place, event))
        self._arrived.set()

    async def get(self) -> tuple[Place, Outcome]:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        place, event = self._events.popleft()
        self._bytes -= _size(event)
        return place, event

    def close(self) -> None:
        """Takes no more; RESOURCE_EXHAUSTED if it were too many."""
        self._closed = True
        if self._overrun and self._task is not None:
            self._task.uncancel()
            raise self._too_slow()

    def _too_slow(self) -> RequestError:
        message = (
            f"the client reads too slowly: more than {self._max_bytes} bytes of the answer wait "
            "for it"
        )
        return resource_exhausted(message, "max_unread_bytes")


def _size(event: Outcome) -> int:
    return 0 if isinstance(event, Exception) else event.ByteSize()
