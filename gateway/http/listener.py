"""The HTTP port in the gateway's event loop: uvicorn's protocol on a socket of its own."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from uvicorn.server import ServerState

from gateway.http.app import Api, application
from gateway.http.connection import Connection, ConnectionLimits, protocol_config
from gateway.http.endpoint import Door
from gateway.http.handlers.completions import Completions
from gateway.http.handlers.models import Models
from gateway.http.handlers.scoring import Scoring
from gateway.http.handlers.tokenizing import Tokenizing
from gateway.http.options import HttpOptions
from gateway.replicas.pool import ReplicaPool
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.pipeline import Pipeline
from serving.errors import StartError
from serving.intake.grpc_options import FRONT_SHARE, HANDSHAKE_MS, max_connections
from serving.intake.interceptor import Authorize
from serving.security.tls import ServerCertificates, TlsFiles
from serving.server import Front, Intake
from serving.settings import ServerSettings

_log = structlog.stdlib.get_logger(__name__)

# Connections that the system accepts before the process does.
_BACKLOG = 2048
# Bytes of an answer that the system keeps for a client that does not read, of each connection.
# Without this bound they grow to megabytes.
_SEND_BUFFER_BYTES = 128 * 1024
# Seconds until a silent client is asked for a sign of life, then between three more questions.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class HttpFront:
    """The open port; serves until `stop`."""

    def __init__(self, address: str, server: asyncio.Server, state: ServerState) -> None:
        self._address = address
        self._server = server
        self._state = state

    @property
    def address(self) -> str:
        return self._address

    async def stop(self, grace: float) -> None:
        """Closes the port; requests that still run after `grace` seconds are cancelled."""
        self._server.close()
        connections, tasks = self._state.connections, self._state.tasks
        for connection in [*connections]:
            connection.shutdown()
        if tasks:
            _, late = await asyncio.wait({*tasks}, timeout=grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for connection in [*connections]:
            connection.transport.abort()


def http_front(
    options: HttpOptions | None,
    pipeline: Pipeline,
    replicas: ReplicaPool,
    streams: NamedStreams,
    authorize: Authorize | None,
) -> Callable[[Intake], Awaitable[Front]] | None:
    """The function that opens the port; None without options.

    The function raises StartError if the port cannot be used.
    """
    if options is None:
        return None
    api = Api(
        Completions(pipeline, streams),
        Scoring(pipeline),
        Tokenizing(pipeline),
        Models(pipeline, replicas),
    )

    async def listen(intake: Intake) -> Front:
        settings, state = intake.settings, ServerState()
        limits = ConnectionLimits(
            connections=max_connections(settings, FRONT_SHARE),
            head_timeout=settings.receive_timeout,
            idle=settings.max_connection_idle,
        )
        door = Door(intake, authorize, pipeline.admission.key_quotas)
        config = protocol_config(application(api, door, options.origins), limits)
        listening, tls = _bound(settings, options.port), _tls(settings)
        server = await asyncio.get_running_loop().create_server(
            partial(Connection, config, state, limits),
            sock=listening,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_MS / 1000,
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{listening.getsockname()[1]}"
        _log.info("serving HTTP", http_address=address)
        return HttpFront(address, server, state)

    return listen


def _bound(settings: ServerSettings, port: int) -> socket.socket:
    """A socket on the port; connections that it accepts have its options."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[
            0
        ]
        # With the protocol named, asyncio sets TCP_NODELAY on each connection. Without it, small
        # writes would wait for the client's delayed acknowledgements, 40 ms each.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            stalled = round(settings.max_connection_idle * 1000)
            for name, value in {**_KEEPALIVE, "TCP_USER_TIMEOUT": stalled}.items():
                if option := getattr(socket, name, None):  # Linux has all of them
                    listening.setsockopt(socket.IPPROTO_TCP, option, value)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise StartError(
            f"cannot listen on {settings.host}:{port} for HTTP: {error.strerror}; choose another "
            "port with --http_port, or none with --http_port 0"
        ) from error
    return listening


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    files = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return ServerCertificates(files).ssl_context()
