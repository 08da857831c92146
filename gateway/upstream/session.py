"""The session with one upstream, a service that the gateway calls.

A session that breaks is started again, until the task that keeps it is cancelled.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from gateway.upstream.connect import failure_reason
from llama.v1.operator_pb2 import (
    UPSTREAM_STATE_CONNECTING,
    UPSTREAM_STATE_NOT_SERVING,
    UPSTREAM_STATE_REFUSED,
    UPSTREAM_STATE_SERVING,
    UpstreamState,
)
from serving.telemetry import request_id, tracing

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

_log = structlog.stdlib.get_logger(__name__)


class UpstreamError(Exception):
    """The upstream cannot be used now; the message tells the operator why."""


class UnfitUpstreamError(UpstreamError):
    """The upstream serves something that does not fit this gateway."""


class SessionEndedError(UpstreamError):
    """The session of a call, and its channel, ended before the call did."""


class Upstream:
    """A service behind this gateway, and its state."""

    def __init__(self, target: str, changed: Callable[[], None]) -> None:
        """`changed` is called whenever the state is set."""
        self.target = target
        self.state: UpstreamState.ValueType = UPSTREAM_STATE_CONNECTING
        self.reason = "not connected yet"  # why it does not serve; empty while it does
        self._changed = changed
        self._serves = asyncio.Event()

    @property
    def serving(self) -> bool:
        return self._serves.is_set()

    async def until_serving(self) -> None:
        await self._serves.wait()

    def become(self, state: "UpstreamState.ValueType", reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state == UPSTREAM_STATE_SERVING:
            self._serves.set()
        else:
            self._serves.clear()
        self._changed()

    def told(self, *, serving: bool) -> None:
        """Sets the state that its health service reports."""
        if serving:
            self.become(UPSTREAM_STATE_SERVING)
        else:
            self.become(
                UPSTREAM_STATE_NOT_SERVING, "takes no work: it starts, drains or is stalled"
            )


async def keep_session(upstream: Upstream, session: Callable[[], Awaitable[None]]) -> NoReturn:
    """Runs `session` in a loop, with growing pauses while it fails.

    A reason that repeats is logged only once.
    """
    loop = asyncio.get_running_loop()
    pause, last_reason = FIRST_PAUSE, ""
    while True:
        started = loop.time()
        state, reason = UPSTREAM_STATE_CONNECTING, "the session ended"
        try:
            await session()
        except* UnfitUpstreamError as group:
            state, reason = UPSTREAM_STATE_REFUSED, "; ".join(_reasons(group))
        except* (grpc.aio.AioRpcError, UpstreamError) as group:
            reason = "; ".join(_reasons(group))
        upstream.become(state, reason)
        if loop.time() - started > LONGEST_PAUSE:
            pause, last_reason = FIRST_PAUSE, ""
        if reason != last_reason:
            _log.error("upstream unusable", upstream=upstream.target, reason=reason)
        last_reason = reason
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def follow_health(channel: grpc.aio.Channel, service: str, upstream: Upstream) -> NoReturn:
    """Keeps the state of `upstream` up to date from its health service, until the stream ends."""
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(HealthCheckRequest(service=service))  # type: ignore[attr-defined]  # not in the stubs
    try:
        async for response in call:
            upstream.told(serving=response.status == HealthCheckResponse.SERVING)
    finally:
        call.cancel()
    raise UpstreamError("the health stream ended")


async def answer(call: grpc.aio.UnaryUnaryCall[RequestT, ResponseT]) -> ResponseT:
    """The response of a unary call, which is cancelled together with the task that waits for it.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        SessionEndedError: the channel was closed during the call.
    """
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise SessionEndedError("the session ended") from None
    finally:
        call.cancel()


def call_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that links the upstream's log lines and spans to those of the request."""
    current = request_id.current()
    identity = () if current is None else ((request_id.METADATA_KEY, current),)
    return (*identity, *tracing.metadata())


def _reasons(group: ExceptionGroup[Exception]) -> list[str]:
    reasons = []
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            reasons += _reasons(error)
        elif isinstance(error, grpc.aio.AioRpcError):
            reasons.append(failure_reason(error))
        else:
            reasons.append(str(error))
    return reasons
