"""What waits for a client to read. Tokens that come before it has read the last ones become one
event with those: a message costs the same whatever is in it, so whoever falls behind catches up.
There is a bound. A client that stops reading blocks the task that writes to it, so that is
interrupted: everything it holds is given back there and then, and not when the client cares to read
on.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.generation.generation import Outcome
from serving.errors import RequestError, resource_exhausted

Place = TypeVar("Place")


@dataclass(slots=True)
class _Unread(Generic[Place]):
    place: Place
    outcome: Outcome
    bytes: int


class UnreadEvents(Generic[Place]):
    """A queue of at most `max_bytes`, counted as they came over the wire.

    Belongs to the task that makes it, which takes the events. When they are too many, that task is
    cancelled; `close` turns that into the error it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._events: deque[_Unread[Place]] = deque()
        self._last: dict[Place, _Unread[Place]] = {}  # of those, by place
        self._arrived = asyncio.Event()
        self._task = asyncio.current_task()
        self._overrun = False
        self._closed = False

    def put(self, place: Place, event: Outcome) -> None:
        if self._closed or self._overrun:
            return
        size = _size(event)
        self._bytes += size
        if self._bytes > self._max_bytes and self._task is not None:
            self._overrun = True
            self._events.clear()
            self._last.clear()
            self._task.cancel()
            return
        last = self._last.get(place)
        if last is not None and _join(last.outcome, event):
            last.bytes += size
            return
        self._last[place] = unread = _Unread(place, event, size)
        self._events.append(unread)
        self._arrived.set()

    async def get(self) -> tuple[Place, Outcome]:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        unread = self._events.popleft()
        if self._last[unread.place] is unread:
            del self._last[unread.place]
        self._bytes -= unread.bytes
        return unread.place, unread.outcome

    def close(self) -> None:
        """Takes no more; RESOURCE_EXHAUSTED if it were too many."""
        self._closed = True
        self._events.clear()
        self._last.clear()
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


def _join(earlier: Outcome, later: Outcome) -> bool:
    """Puts `later` behind `earlier`, into it, where the two can be one event."""
    if isinstance(earlier, Exception) or isinstance(later, Exception):
        return False
    if later.HasField("error") or earlier.HasField("error"):
        return False
    # Each id has its alternatives, or none has.
    if earlier.ids and later.ids and bool(earlier.top) != bool(later.top):
        return False
    earlier.MergeFrom(later)
    return True
