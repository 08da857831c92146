"""Named streams, which outlive their connections.

A background task generates each stream and keeps its last events as serialized responses. A call
only reads them, and another call can continue where it broke off. A stream, running or ended, is
forgotten once it has had no reader for the grace time.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import grpc
import structlog

from gateway.rpc.ended_streams import EndedStreams, StreamKey
from serving.errors import RequestError, clear_frames, unavailable
from serving.security import caller

# Bytes of a kept event beyond its serialized ones. Events are kept serialized, because an event of
# 33 bytes takes 930 as a protobuf object, and one with alternatives six times its bytes.
EVENT_OVERHEAD = 48
# Bytes of an ended stream beyond its events: 4 KB for its objects, and the context of its call with
# the fields of logs and traces.
STREAM_OVERHEAD = 8 * 1024

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Limits on the memory of named streams, and on the time that they are kept."""

    grace: float  # seconds without a reader
    buffer_bytes: int  # of one stream's events
    ended_bytes: int  # of all streams that have ended


class NamedStreams:
    """The named streams of all callers."""

    def __init__(self, limits: StreamLimits) -> None:
        self._limits = limits
        self._streams: dict[StreamKey, _Stream] = {}
        self._ended = EndedStreams(limits.ended_bytes)
        self._draining = False

    @property
    def detached(self) -> int:
        """The number of running streams that no call reads; can be read from any thread."""
        return sum(stream.is_detached for stream in [*self._streams.values()])

    def open(
        self, name: str, events: AsyncGenerator[bytes, None], within: float | None
    ) -> AsyncGenerator[bytes, None]:
        """Starts a stream of the current caller, and reads it.

        `within` limits the seconds until its first event; after that it has no deadline.
        """
        if self._draining:
            raise unavailable("this gateway is shutting down")
        key = _key(name)
        if key in self._streams:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"there is a stream with the stream_name {name!r}: continue it with ResumeStream, "
                "or choose another name",
            )
        give_up: Callable[[_Stream], None] = partial(self._give_up, key)
        stream = _Stream(events, within, self._limits, give_up)
        self._streams[key] = stream
        stream.task.add_done_callback(lambda _task: self._keep_ended(key, stream))
        return stream.read(0)

    def resume(self, name: str, after: int) -> AsyncGenerator[bytes, None]:
        """Reads a stream of the current caller from the event after number `after` on."""
        return self._find(_key(name)).read(after)

    async def cancel(self, name: str) -> None:
        """Ends and forgets a stream of the current caller; returns when it holds nothing more."""
        key = _key(name)
        stream = self._find(key)
        self._forget(key)
        await asyncio.wait({stream.task})

    def refuse_new(self) -> None:
        """Refuses new streams; running ones can still be resumed."""
        self._draining = True

    async def drain(self) -> None:
        """Waits until no stream runs; meanwhile they can still be resumed."""
        while running := [each.task for each in self._streams.values() if not each.ended]:
            await asyncio.wait(running)

    async def close(self) -> None:
        """Ends and forgets all streams."""
        tasks = {stream.task for stream in self._streams.values()}
        for key in [*self._streams]:
            self._forget(key)
        if tasks:
            await asyncio.wait(tasks)

    def _find(self, key: StreamKey) -> "_Stream":
        if key not in self._streams:
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                f"there is no stream with the stream_name {key[1]!r}: it was never begun here, was "
                f"cancelled, or had no reader for {self._limits.grace:g} seconds",
            )
        return self._streams[key]

    def _give_up(self, key: StreamKey, stream: "_Stream") -> None:
        if self._streams.get(key) is not stream:  # another stream may have the name by now
            return
        if not stream.ended:
            _log.info("stream given up", stream=key[1], events=stream.last)
        self._forget(key)

    def _keep_ended(self, key: StreamKey, stream: "_Stream") -> None:
        if self._streams.get(key) is not stream:
            return
        if stream.last == 0:  # refused: the name is free for another try
            self._forget(key)
            return
        for forgotten in self._ended.add(key, stream.kept_bytes + STREAM_OVERHEAD):
            self._streams.pop(forgotten).stop()

    def _forget(self, key: StreamKey) -> None:
        self._ended.remove(key)
        self._streams.pop(key).stop()


class _Stream:
    """One stream: the task that generates it, the last events, and at most one reader.

    A full buffer drops its oldest events. Events that the reader has not read yet are not dropped:
    the task waits for the reader instead.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        within: float | None,
        limits: StreamLimits,
        give_up: "Callable[[_Stream], None]",
    ) -> None:
        self.ended = False
        self.kept_bytes = 0
        self._kept: deque[bytes] = deque()
        self._dropped = 0  # how many events are no longer kept
        self._failure: BaseException | None = None
        self._limits = limits
        self._give_up: Callable[[_Stream], None] = give_up
        self._reader: asyncio.Event | None = None  # set when the stream has changed
        self._position = 0  # the last event that the reader has taken
        self._read = asyncio.Event()
        self._expiry = self._expire_later()
        # The task keeps the caller and the request id of the call that began the stream.
        self.task = asyncio.create_task(self._make(events, within))
        self.task.add_done_callback(self._end)

    @property
    def last(self) -> int:
        """The number of the last event."""
        return self._dropped + len(self._kept)

    @property
    def is_detached(self) -> bool:
        return self._reader is None and not self.ended

    def read(self, after: int) -> AsyncGenerator[bytes, None]:
        """The events after number `after`, as they come; an earlier reader fails with ABORTED."""
        if after < self._dropped:
            raise RequestError(
                grpc.StatusCode.OUT_OF_RANGE,
                f"after_event_number: the events up to {self._dropped} are no longer kept, "
                f"and those after {after} were asked for",
            )
        if after > self.last:
            raise RequestError(
                grpc.StatusCode.OUT_OF_RANGE,
                f"after_event_number: must be at most {self.last}, the last event, not {after}",
            )
        return self._reading(after)

    def stop(self) -> None:
        """Ends the task."""
        self._expiry.cancel()
        self.task.cancel()

    async def _reading(self, after: int) -> AsyncGenerator[bytes, None]:
        news = self._take_over(after)
        try:
            while self._reader is news:
                if self._position < self.last:
                    response = self._kept[self._position - self._dropped]
                    self._position += 1
                    self._read.set()
                    yield response
                elif not self.ended:
                    news.clear()
                    await news.wait()
                elif self._failure is not None:
                    raise self._failure
                else:
                    return
            raise RequestError(grpc.StatusCode.ABORTED, "another call reads the stream now")
        finally:
            if self._reader is news:
                self._reader = None
                self._read.set()
                self._expiry = self._expire_later()

    def _take_over(self, after: int) -> asyncio.Event:
        self._expiry.cancel()
        self._tell_reader()
        self._reader = asyncio.Event()
        self._position = after
        self._read.set()
        return self._reader

    def _expire_later(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._limits.grace, self._give_up, self)

    async def _make(self, events: AsyncGenerator[bytes, None], within: float | None) -> None:
        async with aclosing(events):
            try:
                async with asyncio.timeout(within):
                    first = await anext(events)
            except TimeoutError:
                message = "the deadline passed before the first event"
                raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
            await self._keep(first)
            async for response in events:
                await self._keep(response)

    async def _keep(self, response: bytes) -> None:
        self._kept.append(response)
        self.kept_bytes += _cost(response)
        self._tell_reader()
        while self.kept_bytes > self._limits.buffer_bytes and len(self._kept) > 1:
            if self._reader is not None and self._position == self._dropped:
                self._read.clear()
                await self._read.wait()
            else:
                self.kept_bytes -= _cost(self._kept.popleft())
                self._dropped += 1

    def _end(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            self._failure = RequestError(grpc.StatusCode.CANCELLED, "the stream was cancelled")
        else:
            self._failure = task.exception()
        if self._failure is not None and not isinstance(self._failure, RequestError):
            _log.error("stream failed", exc_info=self._failure)
        clear_frames(self._failure)
        self.ended = True
        self._tell_reader()

    def _tell_reader(self) -> None:
        if self._reader is not None:
            self._reader.set()


def _key(name: str) -> StreamKey:
    return caller.current().name, name


def _cost(response: bytes) -> int:
    return len(response) + EVENT_OVERHEAD
