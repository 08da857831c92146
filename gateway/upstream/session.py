"""The session with one upstream, a service that the gateway calls.

It is kept as long as it lasts and begun anew when it breaks, for ever. Only cancelling, or a bug,
ends that.
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
    """The upstream is another one than this gateway needs."""


class SessionEndedError(UpstreamError):
    """The session that a call belonged to, and its channel, ended before the call did."""


class Upstream:
    """A service behind this gateway and how it does."""

    def __init__(self, target: str, changed: Callable[[], None]) -> None:
        """`changed` is called at each change of how it does."""
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
        """The answer of its health service."""
        if serving:
            self.become(UPSTREAM_STATE_SERVING)
        else:
            self.become(
                UPSTREAM_STATE_NOT_SERVING, "takes no work: it starts, drains or is stalled"
            )


async def keep_session(upstream: Upstream, session: Callable[[], Awaitable[None]]) -> NoReturn:
    """Runs `session` again and again, with growing pauses while it fails.

    A reason is logged once, not again with each attempt that it makes fail.
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
    """Tells `upstream` whether it serves, now and at each change, until it is lost."""
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(HealthCheckRequest(service=service))  # type: ignore[attr-defined]  # not in the stubs
    try:
        async for response in call:
            upstream.told(serving=response.status == HealthCheckResponse.SERVING)
    finally:
        call.cancel()
    raise UpstreamError("the health stream ended")


async def answer(call: grpc.aio.UnaryUnaryCall[RequestT, ResponseT]) -> ResponseT:
    """The response of a unary call; with its task, the call ends.

    Raises:
        grpc.aio.AioRpcError: it failed.
        SessionEndedError: its channel was closed under it.
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
    """By which the upstream's log lines and spans are found with those of the request."""
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
