"""Start, background task, drain and end of a server; signals are in the tokenizer's tests."""

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from serving.errors import StartError
from serving.server import Health, Service, channel, running, serve
from serving.settings import ServerSettings

Logged = Callable[[], list[dict[str, Any]]]


def say(to_server: grpc.aio.Channel, text: str) -> Any:
    method: Any = to_server.unary_unary(
        "/test.Echo/unary_unary", StringValue.SerializeToString, StringValue.FromString
    )
    return method(StringValue(value=text))


def nothing(_server: grpc.aio.Server) -> None:
    """Registers no methods."""


async def test_request_above_the_limit_is_refused(echo: Any) -> None:
    settings = ServerSettings(max_request_bytes=1000)
    async with running(settings, echo.service()) as server, channel(server.address) as to_server:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(to_server, "x" * 1000)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_request_of_too_many_fields_is_refused_unparsed(
    echo: Any, echo_channel: grpc.aio.Channel
) -> None:
    call: Any = echo_channel.unary_unary("/test.Echo/unary_unary")
    with pytest.raises(grpc.aio.AioRpcError, match="more than 100000 fields in all of its parts"):
        await call(b"\x08\x00" * 200_000)
    assert echo.request_ids == []


async def test_large_request_with_an_endless_varint_is_refused(
    echo: Any, echo_channel: grpc.aio.Channel
) -> None:
    call: Any = echo_channel.unary_unary("/test.Echo/unary_unary")
    refused = call(b"\x08" + b"\xff" * 1_000_000 + b"\x01")
    assert await refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "malformed request" in await refused.details()
    assert echo.request_ids == []


async def test_running_call_finishes_while_the_server_stops(
    echo: Any, echo_channel: grpc.aio.Channel, servers: AsyncExitStack
) -> None:
    running_call = say(echo_channel, "hold")
    await echo.held.wait()
    stopping = asyncio.create_task(servers.aclose())
    while await say(echo_channel, "hello").code() is not grpc.StatusCode.UNAVAILABLE:
        pass  # until the listener is gone, and with it the way in for new calls
    echo.released.set()
    assert (await running_call).value == "hold"
    await stopping


async def test_call_is_cut_off_at_the_end_of_the_grace_period(echo: Any) -> None:
    settings = ServerSettings(grace_period=0)
    async with AsyncExitStack() as servers:
        server = await servers.enter_async_context(running(settings, echo.service()))
        async with channel(server.address) as to_server:
            running_call = say(to_server, "hold")
            await echo.held.wait()
            await servers.aclose()
            assert await running_call.code() is not grpc.StatusCode.OK


async def test_drain_comes_after_health_and_before_the_listener_stops(echo: Any) -> None:
    seen: list[object] = []

    async def drain() -> None:
        async with channel(server.address) as to_server:
            stub: Any = health_pb2_grpc.HealthStub(to_server)
            seen.append((await stub.Check(HealthCheckRequest())).status)
            seen.append((await say(to_server, "still here")).value)

    service = dataclasses.replace(echo.service(), drain=drain)
    async with running(ServerSettings(), service) as server:
        pass
    assert seen == [HealthCheckResponse.NOT_SERVING, "still here"]


async def test_drain_is_cut_off_at_the_end_of_the_grace_period(echo: Any) -> None:
    service = dataclasses.replace(echo.service(), drain=asyncio.Event().wait)
    async with running(ServerSettings(grace_period=0.01), service):
        pass


async def test_background_task_outlives_the_running_calls(echo: Any) -> None:
    events: list[str] = []

    async def run(_health: Health) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            events.append("background task ends")

    service = dataclasses.replace(echo.service(), run=run)
    async with AsyncExitStack() as servers:
        server = await servers.enter_async_context(running(ServerSettings(), service))
        async with channel(server.address) as to_server:
            running_call = say(to_server, "hold")
            running_call.add_done_callback(lambda _: events.append("call ends"))
            await echo.held.wait()
            stopping = asyncio.create_task(servers.aclose())
            echo.released.set()
            await asyncio.gather(running_call, stopping)
    assert events == ["call ends", "background task ends"]


async def test_failure_of_the_background_task_ends_the_server_with_1(logged: Logged) -> None:
    async def run(_health: Health) -> None:
        raise RuntimeError("lost a shard")

    with pytest.raises(SystemExit) as stop:
        await serve(ServerSettings(), Service(["test.A"], nothing, run))
    assert stop.value.code == 1
    last = logged()[-1]
    assert (last["event"], last["level"]) == ("the service failed", "critical")
    assert last["exception"].endswith("RuntimeError: lost a shard")


async def test_start_error_of_the_background_task_is_one_line(logged: Logged) -> None:
    async def run(_health: Health) -> None:
        raise StartError("the tokenizer is another model's; name the right one")

    with pytest.raises(SystemExit) as stop:
        await serve(ServerSettings(), Service(["test.A"], nothing, run))
    assert stop.value.code == 1
    last = logged()[-1]
    assert last["event"] == "the tokenizer is another model's; name the right one"
    assert "exception" not in last


async def test_taken_port_is_one_line_that_names_it(logged: Logged) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            await serve(ServerSettings(port=port), Service(["test.A"], nothing))
    assert stop.value.code == 1
    assert [line["event"] for line in logged()] == [
        f"cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another address with --host or another port with --port"
    ]


async def test_server_says_where_it_listens(logged: Logged) -> None:
    async with running(ServerSettings(), Service(["test.A"], nothing)) as server:
        listening = next(line for line in logged() if line["event"] == "listening")
        assert listening["address"] == server.address
        assert server.address.startswith("127.0.0.1:")
