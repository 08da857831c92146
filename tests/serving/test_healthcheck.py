"""The healthcheck as a container runs it: a process of its own, judged by its exit status."""

import asyncio
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT
from contextlib import AsyncExitStack

import grpc
import pytest

from serving.server import Health, Service, running
from serving.settings import ServerSettings


async def check(*arguments: str) -> tuple[int | None, str]:
    """Exit status and output of `python -m serving.healthcheck`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serving.healthcheck", *arguments, stdout=PIPE, stderr=STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode().strip()


@pytest.fixture
async def address(servers: AsyncExitStack) -> str:
    """The address of a server without methods that is SERVING."""
    service = Service(["test.A"], lambda _: None)
    return (await servers.enter_async_context(running(ServerSettings(), service))).address


async def test_serving_server_is_healthy(address: str) -> None:
    assert await check(address) == (0, f"{address}: SERVING")


async def test_proxy_is_not_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert await check(address) == (0, f"{address}: SERVING")


async def test_server_that_is_not_serving_is_unhealthy(servers: AsyncExitStack) -> None:
    async def run(_health: Health) -> None:
        """Never becomes healthy."""

    service = Service(["test.A"], lambda _: None, run)
    server = await servers.enter_async_context(running(ServerSettings(), service))
    assert await check(server.address) == (1, f"{server.address}: NOT_SERVING")


async def test_server_without_health_service_is_unhealthy() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    status, output = await check(f"127.0.0.1:{port}")
    await server.stop(None)
    assert (status, output) == (1, f"127.0.0.1:{port}: UNIMPLEMENTED: Method not found!")


async def test_port_where_nothing_listens_is_unhealthy_and_says_why() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # held, but not listened on
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        status, output = await check(target)
    assert status == 1
    assert output.startswith(f"{target}: UNAVAILABLE: ")
    assert "Connection refused" in output


async def test_server_that_does_not_answer_in_time_is_unhealthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        status, output = await check(target, "--timeout=0.1")
    assert (status, output) == (1, f"{target}: DEADLINE_EXCEEDED: Deadline Exceeded")


@pytest.mark.parametrize("timeout", ["inf", "1e10"])
async def test_no_time_limit_is_no_time_limit(address: str, timeout: str) -> None:  # noqa: ASYNC109
    assert await check(address, f"--timeout={timeout}") == (0, f"{address}: SERVING")


@pytest.mark.parametrize("timeout", ["nan", "-1", "soon"])
async def test_what_is_no_time_limit_is_wrong_usage(timeout: str) -> None:  # noqa: ASYNC109
    status, output = await check("127.0.0.1:1", f"--timeout={timeout}")
    assert status == 2
    assert output.endswith(f"must be a number of seconds, 0 or more, got {timeout!r}")


@pytest.mark.parametrize("target", ["", "localhost", ":50051", "127.0.0.1:grpc"])
async def test_target_that_is_no_address_is_wrong_usage(target: str) -> None:
    status, output = await check(target)
    assert status == 2
    assert output.endswith(f"HOST:PORT: must be HOST:PORT, got {target!r}")
