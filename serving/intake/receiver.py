"""Reads and parses requests, so that no client can block the event loop or fill the memory.

A request must arrive in time. A large one counts against its caller's budget of bytes until its
call ends, and its fields are counted before it is parsed. Only one large request is parsed at a
time, and the event loop then has as much time for other tasks as that took.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from serving.errors import RequestError, resource_exhausted
from serving.intake.fair_semaphore import FairSemaphore
from serving.intake.field_count import has_more_fields_than
from serving.intake.receive_budget import ReceiveBudget, Reserve
from serving.security import caller
from serving.settings import ServerSettings

Parse: TypeAlias = Callable[[bytes], object]

# A message of this many bytes is parsed within a millisecond, whatever its fields.
_SMALL = 32 * 1024
# Calls of a server whose request has not arrived yet; each takes some 30 KB.
MAX_AWAITED_REQUESTS = 8192


class Source(Protocol):
    """A call whose only request is still to be read: gRPC's context, or an HTTP request."""

    async def read(self) -> object:
        """The serialized request; grpc.aio.EOF if there is none."""


class Receiver:
    """Receives the requests of a server's calls that have one request each."""

    def __init__(self, settings: ServerSettings) -> None:
        self._timeout = settings.receive_timeout
        self._max_fields = settings.max_request_fields
        self._parsing = FairSemaphore(capacity=1)
        self._budget = ReceiveBudget()
        # The timeouts of those calls by caller, in order of arrival.
        self._awaited: dict[str, dict[asyncio.Timeout, None]] = {}

    def reservation(self) -> AbstractContextManager[Reserve]:
        """Frees the current caller's bytes when its call ends; yields the argument of `parse`."""
        return self._budget.reservation(caller.current().name)

    async def read(self, source: Source) -> bytes:
        """The serialized request of a call.

        If too many calls wait for their requests, the caller with the most of them loses the one
        that has waited longest: most requests arrive with their call, so late ones cannot keep
        other callers out.
        """
        name = caller.current().name
        if sum(map(len, self._awaited.values())) >= MAX_AWAITED_REQUESTS:
            self._expire_longest()
        limit = asyncio.timeout(self._timeout)
        awaited = self._awaited.setdefault(name, {})
        awaited[limit] = None
        try:
            async with limit:
                request = await source.read()
        except TimeoutError:
            if limit not in awaited:
                message = "the request was late, and too many calls waited for theirs"
                raise resource_exhausted(message, "awaited requests") from None
            message = f"the request did not arrive within {self._timeout:g} seconds"
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
        finally:
            awaited.pop(limit, None)
            if not awaited:
                self._awaited.pop(name, None)
        if request is grpc.aio.EOF:
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
        return cast("bytes", request)

    async def parse(self, serialized: bytes, parse: Parse, reserve: Reserve) -> object:
        """The request as a message; `reserve` comes from `reservation`."""
        if len(serialized) <= _SMALL:
            return checked(parse)(serialized)
        reserve(len(serialized))
        async with self._parsing.acquire(caller.current().name, len(serialized)):
            began = time.monotonic()
            try:
                await self._require_few_fields(serialized, parse)
                return checked(parse)(serialized)
            finally:
                await asyncio.sleep(time.monotonic() - began)

    def _expire_longest(self) -> None:
        most = max(self._awaited.values(), key=len)
        longest = next(iter(most))
        del most[longest]
        if not longest.expired():
            longest.reschedule(asyncio.get_running_loop().time())

    async def _require_few_fields(self, serialized: bytes, parse: Parse) -> None:
        # `parse` is the method FromString of a generated message class.
        descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        if descriptor is None:
            return
        if await has_more_fields_than(self._max_fields, serialized, descriptor):
            message = f"the request has more than {self._max_fields} fields in all of its parts"
            raise resource_exhausted(message, "max_request_fields", retry_after=None)


def checked(deserialize: Parse) -> Parse:
    """The deserializer, but a malformed message becomes INVALID_ARGUMENT."""

    def parse(serialized: bytes) -> object:
        try:
            return deserialize(serialized)
        except DecodeError as error:
            message = f"malformed request: {error}; strings must be valid UTF-8"
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message) from error

    return parse
