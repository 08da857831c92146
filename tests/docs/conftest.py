"""Fixtures: the services that pages assume to run, and a reader of pages."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Block
from tests.docs.reader import HTTP_PORT, Reader
from tests.e2e.processes import ServiceProcess, start_gateway

StartReading = Callable[[list[Block]], Reader]


@pytest.fixture(scope="session")
def services() -> Iterator[dict[int, ServiceProcess]]:
    """The services that run while a page is read, by the ports that pages name."""
    checkpoint = ROOT / "demo" / "checkpoint"
    files = {"tokenizer_path": checkpoint / "tokenizer.model"}
    with ExitStack() as stack:

        def started(process: ServiceProcess) -> ServiceProcess:
            stack.callback(process.stop)
            return process

        flags = {**files, "ckpt_dir": checkpoint, "model_name": "chasqui-demo", "threads": 1}
        model = started(ServiceProcess("model", "-m", "model_service", **flags))
        tokenizer = started(ServiceProcess("tokenizer", "-m", "tokenizer_service", **files))
        gateway = started(start_gateway(tokenizer, model))
        gateway.wait_until(serving=True)
        yield {50051: gateway, 50052: tokenizer, 50053: model}


@pytest.fixture(scope="session")
def ports(services: dict[int, ServiceProcess]) -> dict[int, int]:
    """For each port that pages name, the port that the service has here."""
    grpc = {port: int(each.address.rpartition(":")[2]) for port, each in services.items()}
    return {**grpc, HTTP_PORT: int(services[50051].http_url.rpartition(":")[2])}


@pytest.fixture
def start_reading(tmp_path: Path, ports: dict[int, int]) -> Iterator[StartReading]:
    """Makes the reader of a page; processes that its blocks started end with the test."""
    with ExitStack() as stack:

        def start(page: list[Block]) -> Reader:
            reader = Reader(page, tmp_path, ports)
            stack.callback(reader.close)
            return reader

        yield start
