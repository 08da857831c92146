"""From a call to its request: in time, and so that no request keeps the event loop from all others.

A large one has its fields counted before it is parsed, is parsed while no other large one is, and
then leaves as much time for everything else as that took.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from serving import caller
from serving.errors import RequestError, resource_exhausted
from serving.fair_turns import FairTurns
from serving.settings import ServerSettings
from serving.wire import holds_more_than

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Parse: TypeAlias = Callable[[bytes], object]

# Bytes that are parsed within a millisecond, whatever they hold.
_SMALL = 32 * 1024


class Receiver:
    """Takes the single requests of a server's calls."""

    def __init__(self, settings: ServerSettings) -> None:
        self._timeout = settings.receive_timeout
        self._max_fields = settings.max_request_fields
        self._large = FairTurns(capacity=1)

    async def receive(self, context: Context, parse: Parse) -> object:
        """The call's request, parsed."""
        serialized = await self._read(context)
        if len(serialized) <= _SMALL:
            return checked(parse)(serialized)
        async with self._large.turn(caller.current().name, len(serialized)):
            began = time.monotonic()
            try:
                await self._require_few_fields(serialized, parse)
                return checked(parse)(serialized)
            finally:
                await asyncio.sleep(time.monotonic() - began)

    async def _read(self, context: Context) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                request = await context.read()
        except TimeoutError:
            message = f"the request did not arrive within {self._timeout:g} seconds"
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
        if request is grpc.aio.EOF:
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
        return cast("bytes", request)

    async def _require_few_fields(self, serialized: bytes, parse: Parse) -> None:
        # A generated message's own `FromString`.
        descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        if descriptor is None:
            return
        if await holds_more_than(self._max_fields, serialized, descriptor):
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
