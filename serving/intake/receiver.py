"""From a call to its request: in time, and so that no request keeps the event loop from all others.

A large one counts against its caller's bytes until its call ends. It has its fields counted before
it is parsed, is parsed while no other large one is, and then leaves as much time for everything
else as that took.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from serving.errors import RequestError, resource_exhausted
from serving.intake.fair_semaphore import FairSemaphore
from serving.intake.field_count import has_more_fields_than
from serving.intake.receive_budget import ReceiveBudget, Take
from serving.security import caller
from serving.settings import ServerSettings

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Parse: TypeAlias = Callable[[bytes], object]

# Bytes that are parsed within a millisecond, whatever they hold.
_SMALL = 32 * 1024
# Calls whose request has not arrived yet, of a server in all; each takes some 30 KB.
MAX_AWAITED_REQUESTS = 8192


class Receiver:
    """Takes the single requests of a server's calls."""

    def __init__(self, settings: ServerSettings) -> None:
        self._timeout = settings.receive_timeout
        self._max_fields = settings.max_request_fields
        self._large = FairSemaphore(capacity=1)
        self._held = ReceiveBudget()
        # By caller, each in order of arrival.
        self._awaited: dict[str, dict[asyncio.Timeout, None]] = {}

    def holding(self) -> AbstractContextManager[Take]:
        """For as long as the current caller's call lasts; what it yields is for `parse`."""
        return self._held.holding(caller.current().name)

    async def read(self, context: Context) -> bytes:
        """The call's request, as it arrived.

        When too many calls wait for theirs, the caller with the most loses the one that has waited
        for longest: most requests arrive with their call, so late ones cannot keep others out.
        """
        name = caller.current().name
        if sum(map(len, self._awaited.values())) >= MAX_AWAITED_REQUESTS:
            self._give_up_longest()
        limit = asyncio.timeout(self._timeout)
        awaited = self._awaited.setdefault(name, {})
        awaited[limit] = None
        try:
            async with limit:
                request = await context.read()
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

    async def parse(self, serialized: bytes, parse: Parse, take: Take) -> object:
        """The request as a message."""
        if len(serialized) <= _SMALL:
            return checked(parse)(serialized)
        take(len(serialized))
        async with self._large.acquire(caller.current().name, len(serialized)):
            began = time.monotonic()
            try:
                await self._require_few_fields(serialized, parse)
                return checked(parse)(serialized)
            finally:
                await asyncio.sleep(time.monotonic() - began)

    def _give_up_longest(self) -> None:
        most = max(self._awaited.values(), key=len)
        longest = next(iter(most))
        del most[longest]
        if not longest.expired():
            longest.reschedule(asyncio.get_running_loop().time())

    async def _require_few_fields(self, serialized: bytes, parse: Parse) -> None:
        # A generated message's own `FromString`.
        descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        if descriptor is None:
            return
        if await has_more_fields_than(self._max_fields, serialized, descriptor):
            message = f"the request has more than {self._max_fields} fields in all of its parts"
            raise resource_exhausted(message, "max_request_fields", retry_after=None)


def checked(deserialize: Parse) -> Parse:
    """The deserializer, with a fault of the request's bytes reported as the caller's fault."""

    def parse(serialized: bytes) -> object:
        try:
            return deserialize(serialized)
        except DecodeError as error:
            message = f"malformed request: {error}; strings must be valid UTF-8"
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message) from error

    return parse
