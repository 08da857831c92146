"""Limits of connections and calls, and of the log lines about them."""

import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from serving.intake import receiver
from serving.security.caller import ANONYMOUS, Caller
from serving.server import channel, running
from serving.settings import ServerSettings
from serving.standard_services import stream_limiter
from serving.telemetry.rate_limited_log import RateLimitedLog

Logged = Callable[[], list[dict[str, Any]]]

# The start of a client's connection: the preface, and an empty frame of settings.
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def connection(address: str) -> grpc.aio.Channel:
    """A channel that shares its connection with no other."""
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


async def watching(to_server: grpc.aio.Channel) -> Any:
    """A health watch that the server has accepted; waits for its turn at the bound."""
    stub: Any = health_pb2_grpc.HealthStub(to_server)
    while True:
        watch = stub.Watch(HealthCheckRequest())
        if await watch.read() is not grpc.aio.EOF:
            return watch


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


async def test_idle_connections_make_room_for_a_new_client(
    echo: Any, servers: AsyncExitStack
) -> None:
    settings = ServerSettings(max_connections=3, max_connection_idle=0.5)
    server = await servers.enter_async_context(running(settings, echo.service()))
    host, _, port = server.address.rpartition(":")
    with ExitStack() as held:
        for greeting in (b"", HTTP2_GREETING, HTTP2_GREETING):
            idle = held.enter_context(socket.create_connection((host, int(port)), 30))
            idle.sendall(greeting)
            assert idle.recv(1)
        async with channel(server.address) as to_server:
            method: Any = to_server.unary_unary("/test.Echo/unary_unary")
            assert await method(b"", wait_for_ready=True, timeout=30) == b""


async def test_connection_with_a_call_is_not_idle_and_an_idle_one_comes_back_unnoticed(
    echo: Any, servers: AsyncExitStack
) -> None:
    settings = ServerSettings(max_connection_idle=0.5)
    server = await servers.enter_async_context(running(settings, echo.service()))
    async with connection(server.address) as busy, connection(server.address) as idle:
        watch = await watching(busy)
        method: Any = idle.unary_unary("/test.Echo/unary_unary")
        assert await method(b"") == b""
        while (state := idle.get_state()) is not grpc.ChannelConnectivity.IDLE:
            await idle.wait_for_state_change(state)
        assert not watch.done()
        assert await method(b"") == b""


async def test_held_streams_of_a_connection_are_bounded_and_checks_still_answer(
    echo: Any, servers: AsyncExitStack
) -> None:
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with connection(server.address) as to_server, connection(server.address) as other:
        stub: Any = health_pb2_grpc.HealthStub(to_server)
        first, *_ = [await watching(to_server) for _ in range(stream_limiter.MAX_PER_CONNECTION)]
        reflection: Any = ServerReflectionStub(to_server)  # type: ignore[arg-type]
        for further in (stub.Watch(HealthCheckRequest()), reflection.ServerReflectionInfo()):
            assert await further.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING
        await watching(other)
        first.cancel()
        await watching(to_server)


@pytest.mark.parametrize("bound", ["MAX_IN_ALL", "MAX_PER_ADDRESS"])
async def test_held_streams_of_a_server_are_bounded_over_all_connections(
    echo: Any, servers: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(stream_limiter, bound, 3)
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with AsyncExitStack() as connections:
        for _ in range(3):
            await watching(await connections.enter_async_context(connection(server.address)))
        further = await connections.enter_async_context(connection(server.address))
        stub: Any = health_pb2_grpc.HealthStub(further)
        refused = stub.Watch(HealthCheckRequest())
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 health and reflection streams" in await refused.details()
        assert (await stub.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING


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


async def test_the_call_that_waits_longest_for_its_request_gives_way(
    echo: Any, servers: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_AWAITED_REQUESTS", 3)
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with channel(server.address) as to_server:
        method: Any = to_server.stream_unary("/test.Echo/unary_unary")
        held = []
        for _ in range(4):
            held.append(method())
            await held[-1].initial_metadata()  # the server waits for its request
        assert await held[0].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "too many calls waited for theirs" in await held[0].details()
        message = StringValue(value="hello").SerializeToString()
        assert await method(iter([message])) == message
        await held[3].write(message)
        await held[3].done_writing()
        assert await held[3] == message


async def test_late_requests_of_one_caller_do_not_take_anothers_place(
    echo: Any, servers: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_AWAITED_REQUESTS", 3)

    def authorize(_method: str, metadata: Any) -> Caller:
        return replace(ANONYMOUS, name=dict(metadata)["name"])

    service = replace(echo.service(), authorize=authorize)
    server = await servers.enter_async_context(running(ServerSettings(), service))
    async with channel(server.address) as to_server:
        method: Any = to_server.stream_unary("/test.Echo/unary_unary")
        calls = []
        for name in ("ben", "ada", "ada", "ada"):
            calls.append(method(metadata=(("name", name),)))
            await calls[-1].initial_metadata()
        assert await calls[1].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await calls[0].write(b"")
        await calls[0].done_writing()
        assert await calls[0] == b""


async def test_call_without_a_request_is_told_so(echo: Any, servers: AsyncExitStack) -> None:
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with channel(server.address) as to_server:
        method: Any = to_server.stream_unary("/test.Echo/unary_unary")
        call = method(iter([]))
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "the call has no request"


def test_frequent_warnings_are_logged_at_a_limited_rate_with_a_count(logged: Logged) -> None:
    now = 0.0
    limited, log = RateLimitedLog(10.0, lambda: now), structlog.stdlib.get_logger("test")
    for now in (0.0, 1.0, 9.0, 10.5, 11.0, 21.0):
        limited.warn(log, "refused", at=str(now))
    assert [(line["at"], line["suppressed"]) for line in logged()] == [
        ("0.0", 0),
        ("10.5", 2),
        ("21.0", 1),
    ]
