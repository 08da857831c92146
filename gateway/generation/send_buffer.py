"""The buffer of events that a client has not read yet.

Events of one answer are merged while they wait: a message costs the same whatever its size, so a
slow client catches up. The buffer is bounded. A client that stops reading blocks the task that
writes to it; on overflow that task is cancelled, which frees everything that the request holds.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from llama.v1 import model_pb2
from serving.errors import RequestError, resource_exhausted

KeyT = TypeVar("KeyT")
OutcomeT = TypeVar("OutcomeT")


@dataclass(slots=True)
class _Waiting(Generic[KeyT, OutcomeT]):
    key: KeyT
    outcome: OutcomeT
    bytes: int


class SendBuffer(Generic[KeyT, OutcomeT]):
    """A queue of at most `max_bytes` of events, in serialized size.

    The task that writes to the client enters it as a context and takes events out. On overflow that
    task is cancelled, and the end of the `with` block turns this into RESOURCE_EXHAUSTED.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: deque[_Waiting[KeyT, OutcomeT]] = deque()
        self._last: dict[KeyT, _Waiting[KeyT, OutcomeT]] = {}  # the newest of those, by key
        self._arrival: asyncio.Future[None] | None = None  # while `get` waits for an outcome
        self._task: asyncio.Task[object] | None = None
        self._overrun = False
        self._closed = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()
        if self._overrun and self._task is not None:
            self._task.uncancel()
            raise self._too_slow()

    def put(self, key: KeyT, outcome: OutcomeT) -> None:
        """Appends an outcome, or merges it into the last one of its key; no effect once closed."""
        if self._closed or self._overrun:
            return
        size = outcome.ByteSize() if isinstance(outcome, model_pb2.TokenEvent) else 0
        self._bytes += size
        if self._bytes > self._max_bytes and self._task is not None:
            self._overrun = True
            self._clear()
            self._task.cancel()
            return
        last = self._last.get(key)
        if last is not None and _join(last.outcome, outcome):
            last.bytes += size
            return
        self._last[key] = waiting = _Waiting(key, outcome, size)
        self._waiting.append(waiting)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def close(self) -> None:
        """Drops all waiting and all later outcomes."""
        self._closed = True
        self._clear()

    async def get(self) -> tuple[KeyT, OutcomeT]:
        """The next outcome, with its key."""
        while not self._waiting:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        waiting = self._waiting.popleft()
        if self._last[waiting.key] is waiting:
            del self._last[waiting.key]
        self._bytes -= waiting.bytes
        return waiting.key, waiting.outcome

    def _clear(self) -> None:
        self._waiting.clear()
        self._last.clear()

    def _too_slow(self) -> RequestError:
        message = (
            f"the client reads too slowly: more than {self._max_bytes} bytes of the answer wait "
            "for it"
        )
        return resource_exhausted(message, "max_unread_bytes")


def _join(earlier: object, later: object) -> bool:
    """Merges `later` into `earlier`, if they can be one event; returns whether it did."""
    if not (
        isinstance(earlier, model_pb2.TokenEvent)
        and isinstance(later, model_pb2.TokenEvent)
        and not earlier.HasField("error")
        and not later.HasField("error")
    ):
        return False
    # In one event, either every id has alternatives or none has.
    if earlier.ids and later.ids and bool(earlier.top) != bool(later.top):
        return False
    earlier.MergeFrom(later)
    return True
