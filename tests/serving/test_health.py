"""Health as callers see it: Check and Watch, through start, failure and drain."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from serving.server import Health, Service, channel, running
from serving.settings import ServerSettings
from serving.standard_services.health import LIVENESS

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING

Start = Callable[..., Awaitable[Any]]


@pytest.fixture
async def start(servers: AsyncExitStack) -> AsyncIterator[Start]:
    """Starts a server without methods; returns a stub for its health."""
    async with AsyncExitStack() as channels:

        async def start(
            run: Callable[[Health], Awaitable[None]] | None = None,
            drain: Callable[[], Awaitable[None]] | None = None,
        ) -> Any:
            service = Service(["test.A", "test.B"], lambda _: None, run, drain)
            server = await servers.enter_async_context(running(ServerSettings(), service))
            to_server = await channels.enter_async_context(channel(server.address))
            return health_pb2_grpc.HealthStub(to_server)

        yield start


async def status(stub: Any, name: str = "") -> int:
    response: HealthCheckResponse = await stub.Check(HealthCheckRequest(service=name))
    return response.status


@pytest.mark.parametrize("name", ["", "test.A", "test.B"])
async def test_service_without_background_task_is_healthy_at_once(start: Start, name: str) -> None:
    assert await status(await start(), name) == SERVING


async def test_service_with_background_task_decides_when_it_is_healthy(start: Start) -> None:
    ready = asyncio.Event()

    async def run(health: Health) -> None:
        await ready.wait()
        await health.set_serving(True)

    stub = await start(run)
    assert await status(stub) == NOT_SERVING
    watch = stub.Watch(HealthCheckRequest(service="test.A"))
    assert (await watch.read()).status == NOT_SERVING
    ready.set()
    assert (await watch.read()).status == SERVING
    assert await status(stub, "test.B") == SERVING


async def test_liveness_is_serving_whatever_the_service_says(start: Start) -> None:
    async def run(health: Health) -> None:
        await health.set_serving(False)

    stub = await start(run)
    assert await status(stub) == NOT_SERVING
    assert await status(stub, LIVENESS) == SERVING


async def test_unknown_name_is_not_found_and_says_which_are_known(start: Start) -> None:
    stub = await start()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await status(stub, "test.C")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert error.value.details() == "no service 'test.C' here; there are liveness, test.A, test.B"


async def test_watch_of_unknown_name_says_so_and_stays_open(start: Start) -> None:
    watch = (await start()).Watch(HealthCheckRequest(service="test.C"))
    assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
    assert not watch.done()


async def test_watch_goes_on_when_another_watcher_leaves(
    start: Start, servers: AsyncExitStack
) -> None:
    stub = await start()
    leaving, staying = (stub.Watch(HealthCheckRequest(service="test.A")) for _ in range(2))
    assert (await leaving.read()).status == (await staying.read()).status == SERVING
    leaving.cancel()
    await status(stub)  # arrives after the cancellation, on the same connection
    await servers.aclose()
    assert (await staying.read()).status == NOT_SERVING


async def test_watch_sees_the_drain_and_then_ends(start: Start, servers: AsyncExitStack) -> None:
    watch = (await start()).Watch(HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    await servers.aclose()  # would take the whole grace period if the stream stayed open
    assert (await watch.read()).status == NOT_SERVING
    assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_server_never_becomes_healthy_again(
    start: Start, servers: AsyncExitStack
) -> None:
    draining, tried = asyncio.Event(), asyncio.Event()

    async def run(health: Health) -> None:
        await draining.wait()
        await health.set_serving(True)
        tried.set()

    async def drain() -> None:
        draining.set()
        await tried.wait()

    watch = (await start(run, drain)).Watch(HealthCheckRequest())
    assert (await watch.read()).status == NOT_SERVING
    await servers.aclose()
    assert await watch.code() is grpc.StatusCode.UNAVAILABLE
