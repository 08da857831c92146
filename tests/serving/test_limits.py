"""Bounds on connections and calls, and on what the log tells of those who run into them."""

import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import grpc
import structlog

from serving.seldom import Seldom
from serving.server import channel, running
from serving.settings import ServerSettings

Logged = Callable[[], list[dict[str, Any]]]


async def test_connections_beyond_the_bound_are_closed(echo: Any, servers: AsyncExitStack) -> None:
    settings = ServerSettings(max_connections=3)
    server = await servers.enter_async_context(running(settings, echo.service()))
    host, _, port = server.address.rpartition(":")
    with ExitStack() as held:
        for _ in range(3):
            first = held.enter_context(socket.create_connection((host, int(port)), 30))
            assert first.recv(1)  # HTTP/2 settings
        further = held.enter_context(socket.create_connection((host, int(port)), 30))
        assert further.recv(1) == b""


async def test_request_that_does_not_arrive_is_not_waited_for(
    echo: Any, servers: AsyncExitStack
) -> None:
    settings = ServerSettings(receive_timeout=0.01)
    server = await servers.enter_async_context(running(settings, echo.service()))
    async with channel(server.address) as to_server:
        method: Any = to_server.stream_unary("/test.Echo/unary_unary")
        call = method()
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert await call.details() == "the request did not arrive within 0.01 seconds"


async def test_call_without_a_request_is_told_so(echo: Any, servers: AsyncExitStack) -> None:
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with channel(server.address) as to_server:
        method: Any = to_server.stream_unary("/test.Echo/unary_unary")
        call = method(iter([]))
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "the call has no request"


def test_what_comes_often_is_told_seldom_with_a_count(logged: Logged) -> None:
    now = 0.0
    seldom, log = Seldom(10.0, lambda: now), structlog.stdlib.get_logger("test")
    for now in (0.0, 1.0, 9.0, 10.5, 11.0, 21.0):
        seldom.warn(log, "refused", at=str(now))
    assert [(line["at"], line["untold"]) for line in logged()] == [
        ("0.0", 0),
        ("10.5", 2),
        ("21.0", 1),
    ]
