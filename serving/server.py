"""Starts the gRPC server of a service, and stops it without dropping a call.

The order of the stop matters: first health becomes NOT_SERVING, so that callers use another server,
and the service refuses new long-lived streams (`begin_drain`); then its own long-lived streams end
(`drain`); then health's Watch streams; then the listener, and the calls that still run. The
service's background task ends last, because running calls may depend on it.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from prometheus_client.registry import Collector

from serving.errors import StartError
from serving.intake.grpc_options import Option, server_options
from serving.intake.interceptor import Authorize, CallInterceptor
from serving.intake.receiver import Receiver
from serving.process import freeze_gc
from serving.security.tls import ServerCertificates, TlsFiles, UpstreamCertificates
from serving.settings import ServerSettings
from serving.standard_services import reflection
from serving.standard_services.health import Health
from serving.standard_services.stream_limiter import StreamLimiter
from serving.telemetry import tracing
from serving.telemetry.logs import exit_with_error
from serving.telemetry.metrics import CallMetrics, exposed, registry_of

__all__ = ["Health", "Running", "Service", "channel", "running", "serve"]

# Seconds from NOT_SERVING to the end of the listener. gRPC's core cancels calls that arrive during
# its shutdown before a handler sees them, so clients that watch health get this time to leave.
DRAIN_DELAY = 0.5

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Intake:
    """The parts of a server that calls of all protocols share."""

    settings: ServerSettings
    health: Health
    calls: CallMetrics
    receiver: Receiver


class Front(Protocol):
    """A listener for another protocol than gRPC, beside gRPC's own."""

    @property
    def address(self) -> str:
        """The host and port where it listens."""

    async def stop(self, grace: float) -> None:
        """Closes the listener, and cancels the calls that still run after `grace` seconds."""


@dataclass(frozen=True, slots=True)
class Service:
    """The service's own parts of a server.

    names: its full gRPC names, for health and reflection.
    register: adds its servicers to the server.
    run: a background task that sets the health and watches upstreams; the server ends if it fails,
        not if it returns. Without it the service is SERVING as soon as it listens.
    begin_drain: called when health becomes NOT_SERVING, to refuse calls that could last; others
        are accepted a moment longer.
    drain: then waits until the service's own long-lived streams have ended.
    authorize: returns the caller of a call, or refuses it; without it every call is allowed.
    options: further gRPC options.
    collectors: its own metrics.
    trusts_traceparent: whether callers decide which of their calls are traced.
    front: opens a second listener.
    """

    names: Sequence[str]
    register: Callable[[grpc.aio.Server], None]
    run: Callable[[Health], Awaitable[None]] | None = None
    drain: Callable[[], Awaitable[None]] | None = None
    begin_drain: Callable[[], None] | None = None
    authorize: Authorize | None = None
    options: Sequence[Option] = ()
    collectors: Sequence[Collector] = ()
    trusts_traceparent: bool = True
    front: Callable[[Intake], Awaitable[Front]] | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens. `background` ends only if it fails."""

    address: str
    background: asyncio.Task[None]
    front_address: str = ""  # empty without a second listener


async def serve(settings: ServerSettings, service: Service) -> None:
    """Serves until SIGTERM or SIGINT, drains and returns. A second signal ends the process at once.

    If the service cannot start or its background task fails, the process ends with status 1. The
    error is logged: a `StartError` as one line, any other with its traceback.
    """
    signalled = asyncio.create_task(_stop_signal())
    spans = tracing.exporting(settings, service.names[0], trusts_callers=service.trusts_traceparent)
    try:
        async with spans, running(settings, service) as server:
            freeze_gc()
            await asyncio.wait({signalled, server.background}, return_when=asyncio.FIRST_COMPLETED)
            if server.background.done():
                server.background.result()
    except StartError as error:
        exit_with_error(str(error))
    except Exception:
        _log.critical("the service failed", exc_info=True)
        raise SystemExit(1) from None
    _log.info("stopped")


@contextlib.asynccontextmanager
async def running(settings: ServerSettings, service: Service) -> AsyncIterator[Running]:
    """The server, which listens until the end of the block and then drains. Handles no signals."""
    limiter = StreamLimiter()
    state = Health(service.names, serving=service.run is None, limiter=limiter)
    registry = registry_of(state, service.collectors)
    calls, receiver = CallMetrics(registry), Receiver(settings)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(calls, receiver, service.authorize)],
        options=[
            *server_options(settings, has_front=service.front is not None),
            *service.options,
        ],
    )
    service.register(server)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    names = (*service.names, health.SERVICE_NAME)
    reflection.enable(server, names, limiter, settings.receive_timeout)
    address = _bind(server, settings.host, settings.port, _credentials(settings, service))
    with exposed(settings, registry):
        health_server = await _health_server(settings, state, calls)
        front = None
        if service.front is not None:
            front = await service.front(Intake(settings, state, calls, receiver))
        await server.start()
        _log.info("listening", address=address)
        background = asyncio.create_task(_background(service, state))
        try:
            yield Running(address, background, "" if front is None else front.address)
        finally:
            # Without the background task, running calls could not finish.
            grace = 0.0 if background.done() else settings.grace_period
            await _stop(server, front, service, state, grace)
            if health_server is not None:
                await health_server.stop(None)
            background.cancel()
            await asyncio.wait({background})


def channel(target: str, certificates: UpstreamCertificates | None = None) -> grpc.aio.Channel:
    """A channel to another service; detects a dead server in 15 seconds, reconnects within 2.

    Plaintext without `certificates`, which are read again for each channel.
    """
    options = [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # The services of a deployment reach each other directly, without a proxy.
        ("grpc.enable_http_proxy", 0),
        # No limit for vocabularies and logprobs of our own services; only requests need one.
        ("grpc.max_receive_message_length", -1),
    ]
    if certificates is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(
        target, certificates.credentials(), [*options, *certificates.options]
    )


async def _stop_signal() -> None:
    received = asyncio.Event()
    loop = asyncio.get_running_loop()

    def receive(signum: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        _log.info("draining", signal=signum.name)
        received.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, receive, each)
    await received.wait()


async def _background(service: Service, state: Health) -> None:
    if service.run is not None:
        await service.run(state)
    await asyncio.get_running_loop().create_future()


def _credentials(settings: ServerSettings, service: Service) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None:
        if service.authorize is not None and not _is_loopback(settings.host):
            _log.warning("API keys travel unencrypted: set --tls_cert and --tls_key")
        return None
    files = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return ServerCertificates(files).credentials()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _health_server(
    settings: ServerSettings, state: Health, calls: CallMetrics
) -> grpc.aio.Server | None:
    """A second server for health alone, for probes that cannot use TLS or keys."""
    if settings.health_port is None:
        return None
    interceptors = [CallInterceptor(calls, Receiver(settings))]
    server = grpc.aio.server(interceptors=interceptors, options=server_options(settings))
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    address = _bind(server, settings.host, settings.health_port)
    await server.start()
    _log.info("health port open", health_address=address)
    return server


def _bind(
    server: grpc.aio.Server,
    name: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
) -> str:
    host = f"[{name}]" if ":" in name else name
    try:
        # gRPC does not report the reason of a failure, so a socket of our own finds it first.
        family, _, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        target = f"{host}:{port}"
        if credentials is None:
            return f"{host}:{server.add_insecure_port(target)}"
        return f"{host}:{server.add_secure_port(target, credentials)}"
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}; "
            "choose another address with --host or another port with --port"
        ) from error


async def _stop(
    server: grpc.aio.Server, front: Front | None, service: Service, state: Health, grace: float
) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    await state.drain()
    if service.begin_drain is not None:
        service.begin_drain()
    await asyncio.sleep(min(DRAIN_DELAY, grace))
    try:
        if service.drain is not None:
            async with asyncio.timeout_at(deadline):
                await service.drain()
    except TimeoutError:
        _log.warning("streams cut off at the end of the grace period")
    finally:
        await state.close()
        stopped = [] if front is None else [front.stop(max(deadline - loop.time(), 0))]
        await asyncio.gather(server.stop(max(deadline - loop.time(), 0)), *stopped)
