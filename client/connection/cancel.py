"""Cancels streams by name at a gateway, with asyncio and without."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc

from llama.v1.chat_pb2 import CancelStreamRequest
from llama.v1.chat_pb2_grpc import ChatServiceStub

if TYPE_CHECKING:  # only the stub file has it
    from llama.v1.chat_pb2_grpc import ChatServiceAsyncStub

# Limits how long closing a stream takes if the gateway does not answer.
TIMEOUT = 2.0  # seconds


async def cancel_streams_aio(stub: "ChatServiceAsyncStub", names: Iterable[str]) -> None:
    """Sends all CancelStream calls at once and waits for them; ignores their errors."""
    with suppress(grpc.aio.UsageError):  # the channel is closed
        calls = [
            stub.CancelStream(CancelStreamRequest(stream_name=name), timeout=TIMEOUT)
            for name in names
        ]
        await asyncio.gather(*calls, return_exceptions=True)


def cancel_streams(stub: ChatServiceStub, names: Iterable[str]) -> None:
    """The same without asyncio."""
    with suppress(ValueError):  # the channel is closed
        requests = [CancelStreamRequest(stream_name=name) for name in names]
        calls = [stub.CancelStream.future(request, timeout=TIMEOUT) for request in requests]
        for call in calls:
            call.exception()  # waits
