"""Sends one request, reads its answer and records the times of its events.

This runs once per event of every stream, on one core: it records the time and does nothing else
before the end of an answer.
"""

import itertools
import time
from collections.abc import AsyncIterable
from typing import Self, cast

import grpc

from chasqui.loadtest.records import Failure, Record, Success
from chasqui.loadtest.workload import Work
from client import arguments, results
from client.connection.channel import OPEN, Access, open_aio_channel, with_key
from client.errors import (
    ChasquiError,
    ResourceExhaustedError,
    UnavailableError,
    UnreachableError,
    from_rpc_error,
)
from client.results import Finished
from llama.v1 import chat_pb2
from llama.v1.chat_pb2_grpc import ChatServiceStub

# The pause of a closed loop after a broken connection, so that it does not only count failures.
RECONNECT_SECONDS = 1.0

Response = chat_pb2.TextCompleteStreamResponse | chat_pb2.ChatCompleteStreamResponse

# Seconds, of arbitrary origin.
clock = time.perf_counter


class Sender:
    """The connections to a gateway, which requests use in turn."""

    def __init__(
        self,
        target: str,
        connections: int = 1,
        timeout: float | None = None,
        access: Access = OPEN,
    ) -> None:
        self._target = target
        self._timeout = arguments.seconds(timeout)
        # gRPC lets equal channels share a connection unless each has its own pool.
        own_pool = ("grpc.use_local_subchannel_pool", 1)
        self._channels = [
            open_aio_channel(target, access.tls, own_pool) for _ in range(connections)
        ]
        stubs = [ChatServiceStub(with_key(each, access.api_key)) for each in self._channels]
        self._stubs = itertools.cycle(stubs)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def send(self, work: Work, intended: float, origin: float) -> Record:
        """Reads an answer to its end; a status other than OK becomes a Failure and raises nothing.

        `intended` and `origin`, the start of the run, are times of `clock`.
        """
        arrivals: list[float] = []
        last: Response | None = None
        outcome: Success | Failure
        sent = clock()
        try:
            async for response in self._call(work):
                if response.event.WhichOneof("kind") == "delta":
                    arrivals.append(clock() - origin)
                last = response
            outcome = _outcome(last)
        except grpc.RpcError as error:
            outcome = _failure(from_rpc_error(error, self._target))
        return Record(
            index=work.index,
            intended=intended - origin,
            sent=sent - origin,
            arrivals=tuple(arrivals),
            ended=clock() - origin,
            shortened=work.shortened,
            outcome=outcome,
        )

    def _call(self, work: Work) -> AsyncIterable[Response]:
        stub, request = next(self._stubs), work.request
        if isinstance(request, chat_pb2.TextCompleteStreamRequest):
            return cast(
                "AsyncIterable[Response]", stub.TextCompleteStream(request, timeout=self._timeout)
            )
        return cast(
            "AsyncIterable[Response]", stub.ChatCompleteStream(request, timeout=self._timeout)
        )


def _outcome(last: Response | None) -> Success | Failure:
    event = None if last is None else results.event(last.event)
    if isinstance(event, Finished):
        return Success(event.finish_reason, event.usage)
    return Failure(grpc.StatusCode.UNKNOWN.name, "the stream ended before its answer")


def _failure(error: ChasquiError) -> Failure:
    retry_after = None
    match error:
        case UnreachableError():
            retry_after = RECONNECT_SECONDS
        case UnavailableError() | ResourceExhaustedError():
            retry_after = error.retry_after
    return Failure(error.code.name, error.message, error.request_id, retry_after)
