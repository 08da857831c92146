"""The HTTP port for Prometheus. It has no TLS and no keys, so threads and times are limited."""

import contextlib
import socket
import sys
import threading
from socketserver import ThreadingMixIn
from typing import TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

# Each takes a thread. Prometheus needs one connection.
MAX_CONNECTIONS = 16

Request: TypeAlias = socket.socket | tuple[bytes, socket.socket]
Address: TypeAlias = tuple[str, int]

_log = structlog.stdlib.get_logger(__name__)


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Closes connections beyond the limit at once."""

    daemon_threads = True
    request_queue_size = 4 * MAX_CONNECTIONS  # with Python's 5, a burst waits a second for TCP

    def __init__(self, address: Address, handler: type[WSGIRequestHandler]) -> None:
        super().__init__(address, handler)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Request, client_address: Address) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Request, client_address: Address) -> None:
        deadline = threading.Timer(Handler.timeout, _shut_down, (request,))
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Request, client_address: Address) -> None:  # noqa: ARG002
        """Logs a line instead of a traceback on stderr, because any client can cause errors."""
        _log.debug("scrape failed", reason=repr(sys.exception()))


class Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a connection, regardless of how slowly it sends and reads

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  # inherited
        """Logs nothing."""


def _shut_down(request: Request) -> None:
    if isinstance(request, socket.socket):
        with contextlib.suppress(OSError):  # it has ended
            request.shutdown(socket.SHUT_RDWR)


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> MetricsServer:
    """Serves the registry in separate threads until the server is shut down.

    Raises:
        OSError: the port cannot be used.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    server_class = type("_Server", (MetricsServer,), {"address_family": family})
    server: MetricsServer = make_server(
        host, port, make_wsgi_app(registry), server_class, handler_class=Handler
    )
    threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()
    return server
