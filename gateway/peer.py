"""What the gateway's relations to other services have in common: a session with a peer is kept as
long as it lasts and begun anew when it breaks, for ever. Only cancelling, or a bug, ends that.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import NoReturn

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from gateway.settings import GatewaySettings
from serving.server import channel
from serving.tls import PeerCertificates, TlsFiles

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
# Shorter than the longest pause, after which a session counts as one that had begun.
CONNECT_SECONDS = 4.0

# A new channel to a target.
Connect = Callable[[str], grpc.aio.Channel]

_log = structlog.stdlib.get_logger(__name__)


class PeerError(Exception):
    """The peer cannot be used now; the message says why, to whoever runs the services."""


def connector(settings: GatewaySettings) -> Connect:
    """How this gateway connects to the services behind it."""
    if settings.peer_ca is None:
        return channel
    files = TlsFiles(settings.peer_cert, settings.peer_key, settings.peer_ca)
    return partial(channel, certificates=PeerCertificates(files, settings.peer_name))


@asynccontextmanager
async def connected(connect: Connect, target: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel for one session; a new one each time, as certificates may have changed meanwhile.

    Where it cannot connect in time, the first call on it fails with the reason.
    """
    async with connect(target) as new:
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                await new.channel_ready()
        yield new


async def keep_session(target: str, session: Callable[[], Awaitable[None]]) -> NoReturn:
    """Runs `session` again and again, with growing pauses while it fails.

    A reason is logged once, not again with each attempt that it makes fail.
    """
    loop = asyncio.get_running_loop()
    pause, last_reason = FIRST_PAUSE, ""
    while True:
        started = loop.time()
        reason = "the session ended"
        try:
            await session()
        except* (grpc.aio.AioRpcError, PeerError) as group:
            reason = "; ".join(_reasons(group))
        if loop.time() - started > LONGEST_PAUSE:
            pause, last_reason = FIRST_PAUSE, ""
        if reason != last_reason:
            _log.error("peer unusable", peer=target, reason=reason)
        last_reason = reason
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def follow_health(
    channel: grpc.aio.Channel, service: str, tell: Callable[[bool], None]
) -> NoReturn:
    """Tells whether the peer serves, now and at each change, until the peer is lost."""
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(HealthCheckRequest(service=service))  # type: ignore[attr-defined]  # not in the stubs
    try:
        async for response in call:
            tell(response.status == HealthCheckResponse.SERVING)
    finally:
        call.cancel()
    raise PeerError("the health stream ended")


def _reasons(group: ExceptionGroup[Exception]) -> list[str]:
    reasons = []
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            reasons += _reasons(error)
        elif isinstance(error, grpc.aio.AioRpcError):
            reasons.append(f"{error.code().name}: {error.details()}")
        else:
            reasons.append(str(error))
    return reasons
