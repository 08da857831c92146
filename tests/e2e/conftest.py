"""The three services as processes on a golden checkpoint, found by the address that each logs. The
logs of whatever runs are shown with a test that fails.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from llama.v1 import chat_pb2_grpc, model_pb2_grpc

GOLDEN = Path(__file__).parents[1] / "golden"
CONTEXT_LENGTH = 256  # of the golden cases
TIMEOUT = 120.0  # seconds, on a busy machine

_running: list["ServiceProcess"] = []


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a service told Prometheus."""

    families: list[Metric]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; 0 where there is none."""
        samples = (sample for family in self.families for sample in family.samples)
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


class ServiceProcess:
    """A service as a process; a thread reads what it logs."""

    def __init__(self, name: str, *command: object, **flags: object) -> None:
        self.name = name
        self.log: list[str] = []
        self._address: Future[str] = Future()
        self._metrics_address: Future[str] = Future()
        self._terminated = False
        self._command, self._flags = command, flags
        flags = {"port": 0, "metrics_port": 0, "log_format": "json", **flags}
        arguments = [
            f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()
        ]
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        _running.append(self)

    @property
    def address(self) -> str:
        """Where it listens, as soon as it does."""
        return self._address.result(TIMEOUT)

    def scrape(self) -> Scrape:
        """Its metrics now."""
        with urlopen(f"http://{self._metrics_address.result(TIMEOUT)}/metrics") as response:
            text = response.read().decode()
        return Scrape([*text_string_to_metric_families(text)])

    def wait_until(self, serving: bool) -> None:
        """Waits for its health service to say so."""
        wanted = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        with grpc.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for response in stub.Watch(HealthCheckRequest(), timeout=TIMEOUT):
                if response.status == wanted:
                    return

    def terminate(self) -> None:
        """Asks it to end, once: a second signal would not let it drain."""
        if not self._terminated:
            self._terminated = True
            self._process.terminate()

    @contextmanager
    def again(self) -> Iterator["ServiceProcess"]:
        """After its end: the same service at the same address, until the block ends."""
        flags = {**self._flags, "port": self.address.rpartition(":")[2]}
        process = ServiceProcess(self.name, *self._command, **flags)
        try:
            yield process
        finally:
            process.stop()

    def stop(self) -> int:
        """Ends it; returns its exit status."""
        self.terminate()
        try:
            return self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        finally:
            self._reader.join()
            if self in _running:
                _running.remove(self)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if '"event": "serving metrics"' in line:
                self._metrics_address.set_result(json.loads(line)["address"])
            if '"event": "listening"' in line:
                self._address.set_result(json.loads(line)["address"])
        if not self._address.done():
            self._address.set_exception(RuntimeError(f"{self.name} ended before it listened"))


@dataclass(frozen=True, slots=True)
class Stack:
    """All services, serving."""

    tokenizer: ServiceProcess
    model: ServiceProcess
    gateway: ServiceProcess


def start_tokenizer(**flags: object) -> ServiceProcess:
    flags = {"tokenizer_path": GOLDEN / "tokenizer.model", **flags}
    return ServiceProcess("tokenizer_service", "-m", "tokenizer_service", **flags)


def start_model(checkpoint: str, shards: int, **flags: object) -> ServiceProcess:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", shards)
    return ServiceProcess(
        "model_service",
        *(torchrun if shards > 1 else ()),
        *("-m", "model_service"),
        ckpt_dir=GOLDEN / "checkpoints" / checkpoint,
        tokenizer_path=GOLDEN / "tokenizer.model",
        max_seq_len=CONTEXT_LENGTH,
        threads=1,
        **flags,
    )


def start_gateway(
    tokenizer: ServiceProcess, model: ServiceProcess, **flags: object
) -> ServiceProcess:
    return ServiceProcess(
        "gateway",
        *("-m", "gateway"),
        tokenizer_target=tokenizer.address,
        model_targets=model.address,
        **flags,
    )


@contextmanager
def run_services(
    checkpoint: str,
    shards: int = 1,
    every: Mapping[str, object] = MappingProxyType({}),
    **model_flags: object,
) -> Iterator[Stack]:
    """All services on one checkpoint, until the block ends; `every` is flags of each of them."""
    with ExitStack() as ending:

        def started(process: ServiceProcess) -> ServiceProcess:
            ending.callback(process.stop)
            return process

        model = started(start_model(checkpoint, shards, **model_flags, **every))
        tokenizer = started(start_tokenizer(**every))
        gateway = started(start_gateway(tokenizer, model, **every))
        gateway.wait_until(serving=True)
        yield Stack(tokenizer, model, gateway)


@pytest.fixture(scope="session")
def services() -> Callable[..., AbstractContextManager[Stack]]:
    """Starts a stack of its own for a test that asks for a certain one, or ends some of it."""
    return run_services


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The stack that most tests share."""
    with run_services("mha-mp1", max_batch_size=32) as running:
        yield running


@pytest.fixture
def gateway_beside(stack: Stack) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts a gateway with flags of its own, in front of the shared stack's services."""
    with ExitStack() as ending:

        def start(**flags: object) -> ServiceProcess:
            gateway = start_gateway(stack.tokenizer, stack.model, **flags)
            ending.callback(gateway.stop)
            gateway.wait_until(serving=True)
            return gateway

        yield start


@pytest.fixture
async def chat(stack: Stack) -> AsyncIterator["chat_pb2_grpc.ChatServiceAsyncStub"]:
    """A client of the shared gateway."""
    async with grpc.aio.insecure_channel(stack.gateway.address) as channel:
        yield chat_pb2_grpc.ChatServiceStub(channel)


@pytest.fixture
async def model_service(stack: Stack) -> AsyncIterator["model_pb2_grpc.ModelServiceAsyncStub"]:
    """A client of the shared model service itself, for its load report."""
    async with grpc.aio.insecure_channel(stack.model.address) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last log lines of what runs to the report of a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {each.name}", "".join(each.log[-20:])) for each in _running]
    return report
