"""What the gateway's relations to other services have in common: a session with a peer is kept as
long as it lasts and begun anew when it breaks, for ever. Only cancelling, or a bug, ends that.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from gateway.settings import GatewaySettings
from llama.v1.operator_pb2 import (
    PEER_STATE_CONNECTING,
    PEER_STATE_NOT_SERVING,
    PEER_STATE_REFUSED,
    PEER_STATE_SERVING,
    PeerState,
)
from serving.server import channel
from serving.tls import PeerCertificates, TlsFiles

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
# Shorter than the longest pause, after which a session counts as one that had begun.
CONNECT_SECONDS = 4.0

_log = structlog.stdlib.get_logger(__name__)


class PeerError(Exception):
    """The peer cannot be used now; the message says why, to whoever runs the services."""


class UnfitPeerError(PeerError):
    """The peer is another one than this gateway needs."""


@dataclass(slots=True)
class Peer:
    """A service behind this gateway and how it does; `changed` is called at each change of that."""

    target: str
    changed: Callable[[], None]
    state: "PeerState.ValueType" = PEER_STATE_CONNECTING
    reason: str = "not connected yet"  # why it does not serve; empty while it does

    @property
    def serving(self) -> bool:
        return self.state == PEER_STATE_SERVING

    def become(self, state: "PeerState.ValueType", reason: str = "") -> None:
        self.state, self.reason = state, reason
        self.changed()

    def told(self, *, serving: bool) -> None:
        """What its health service said."""
        if serving:
            self.become(PEER_STATE_SERVING)
        else:
            self.become(PEER_STATE_NOT_SERVING, "takes no work: it starts, drains or is stalled")


class Connect(Protocol):
    """Makes channels."""

    def __call__(self, target: str, name: str | None = None) -> grpc.aio.Channel:
        """A new one to a target, which was found under this name if it is an address of one."""


def plaintext(target: str, name: str | None = None) -> grpc.aio.Channel:  # noqa: ARG001
    return channel(target)


def connector(settings: GatewaySettings) -> Connect:
    """How this gateway connects to the services behind it."""
    if settings.peer_ca is None:
        return plaintext
    files = TlsFiles(settings.peer_cert, settings.peer_key, settings.peer_ca)
    certificates = PeerCertificates(files, settings.peer_name)

    def connect(target: str, name: str | None = None) -> grpc.aio.Channel:
        return channel(target, certificates.expecting(name))

    return connect


@asynccontextmanager
async def connected(
    connect: Connect, target: str, name: str | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel for one session; a new one each time, as certificates may have changed meanwhile.

    Where it cannot connect in time, the first call on it fails with the reason.
    """
    async with connect(target, name) as new:
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                await new.channel_ready()
        yield new


async def keep_session(peer: Peer, session: Callable[[], Awaitable[None]]) -> NoReturn:
    """Runs `session` again and again, with growing pauses while it fails.

    A reason is logged once, not again with each attempt that it makes fail.
    """
    loop = asyncio.get_running_loop()
    pause, last_reason = FIRST_PAUSE, ""
    while True:
        started = loop.time()
        state, reason = PEER_STATE_CONNECTING, "the session ended"
        try:
            await session()
        except* UnfitPeerError as group:
            state, reason = PEER_STATE_REFUSED, "; ".join(_reasons(group))
        except* (grpc.aio.AioRpcError, PeerError) as group:
            reason = "; ".join(_reasons(group))
        peer.become(state, reason)
        if loop.time() - started > LONGEST_PAUSE:
            pause, last_reason = FIRST_PAUSE, ""
        if reason != last_reason:
            _log.error("peer unusable", peer=peer.target, reason=reason)
        last_reason = reason
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def follow_health(channel: grpc.aio.Channel, service: str, peer: Peer) -> NoReturn:
    """Tells `peer` whether it serves, now and at each change, until it is lost."""
    stub = health_pb2_grpc.HealthStub(channel)
    call = stub.Watch(HealthCheckRequest(service=service))  # type: ignore[attr-defined]  # not in the stubs
    try:
        async for response in call:
            peer.told(serving=response.status == HealthCheckResponse.SERVING)
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
