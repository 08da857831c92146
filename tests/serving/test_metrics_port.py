"""The metrics port: limits of its connections, and the end of bad ones."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from serving.telemetry import metrics_port
from serving.telemetry.metrics_port import MetricsServer, serve_metrics


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    started = serve_metrics("127.0.0.1", 0, CollectorRegistry())
    yield started
    started.shutdown()
    started.server_close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), 30)


def scrape(server: MetricsServer) -> None:
    """Waits until one succeeds: nothing tells when the server has let go of a connection."""
    while True:
        with contextlib.suppress(OSError):
            urlopen(f"http://127.0.0.1:{server.server_port}/metrics").close()
            return


def test_idle_connections_are_bounded_and_make_room_again(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_port.Handler, "timeout", 0.5)
    with ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(metrics_port.MAX_CONNECTIONS)]
        further = stack.enter_context(connect(server))
        assert further.recv(1) == b""
        assert [each.recv(1) for each in held] == [b""] * len(held)
    scrape(server)


def test_connections_that_break_write_nothing_to_stderr(
    server: MetricsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with connect(server) as broken:
            broken.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            # Reset, not closed in order.
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scrape(server)
    assert capsys.readouterr().err == ""


def test_a_connection_that_sends_slowly_ends_too(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_port.Handler, "timeout", 0.5)
    with connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        slow.settimeout(0.05)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                slow.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if slow.recv(1) == b"":
                        break
