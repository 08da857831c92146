"""Reflection as tools ask for it: both versions, services and their methods."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from serving.server import channel, running
from serving.settings import ServerSettings
from serving.standard_services.reflection import SERVICE_NAMES, V1


@pytest.fixture(params=SERVICE_NAMES)
def reflect(request: pytest.FixtureRequest, echo_channel: grpc.aio.Channel) -> Any:
    """A raw stub of either version."""
    return echo_channel.stream_stream(
        f"/{request.param}/ServerReflectionInfo",
        ServerReflectionRequest.SerializeToString,
        ServerReflectionResponse.FromString,
    )


async def ask(reflect: Any, **question: str) -> ServerReflectionResponse:
    request = ServerReflectionRequest(**question)  # type: ignore[arg-type]
    response: ServerReflectionResponse = await reflect(iter([request])).read()
    assert response.original_request == request
    return response


async def test_all_services_are_listed(reflect: Any) -> None:
    listed = (await ask(reflect, list_services="")).list_services_response
    assert [service.name for service in listed.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "test.Echo",
    ]


@pytest.mark.parametrize(
    ("symbol", "package"),
    [
        ("grpc.health.v1.Health", "grpc.health.v1"),
        ("grpc.health.v1.Health.Check", "grpc.health.v1"),
        ("grpc.health.v1.HealthCheckRequest", "grpc.health.v1"),
        (f"{V1}.ServerReflection", V1),
        (f"{V1}.ServerReflection.ServerReflectionInfo", V1),
    ],
)
async def test_file_of_a_service_or_method_is_found(
    reflect: Any, symbol: str, package: str
) -> None:
    found = (await ask(reflect, file_containing_symbol=symbol)).file_descriptor_response
    file = FileDescriptorProto.FromString(found.file_descriptor_proto[0])
    assert file.package == package


@pytest.mark.parametrize("symbol", ["", "grpc.health.v1.Health.Nothing", "nothing.at.all"])
async def test_unknown_symbol_is_not_found(reflect: Any, symbol: str) -> None:
    error = (await ask(reflect, file_containing_symbol=symbol)).error_response
    assert error.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_stream_without_a_further_request_ends_in_time(echo: Any) -> None:
    settings = ServerSettings(receive_timeout=0.01)
    async with running(settings, echo.service()) as server, channel(server.address) as to_server:
        method: Any = to_server.stream_stream(f"/{SERVICE_NAMES[0]}/ServerReflectionInfo")
        call = method()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_calls_a_method_that_it_knows_by_reflection_alone(
    echo: Any, version: str
) -> None:
    buf = str(Path(sys.executable).parent / "buf")
    flags = ["--protocol=grpc", "--http2-prior-knowledge", f"--reflect-protocol={version}"]
    async with running(ServerSettings(), echo.service()) as server:
        url = f"http://{server.address}/grpc.health.v1.Health/Check"
        command = [buf, "curl", *flags, '--data={"service": "test.Echo"}', url]
        done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    assert json.loads(done.stdout) == {"status": "SERVING"}
