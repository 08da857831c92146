"""The three services as processes on a golden checkpoint, found by the address that each logs. The
logs of whatever runs are shown with a test that fails.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
import trustme
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from client import Client, Tls
from llama.v1 import chat_pb2, chat_pb2_grpc, model_pb2, model_pb2_grpc

GOLDEN = Path(__file__).parents[1] / "golden"
DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
CONTEXT_LENGTH = 256  # of the golden cases
TIMEOUT = 120.0  # seconds, on a busy machine

_running: list["ServiceProcess"] = []
_ended: deque["ServiceProcess"] = deque(maxlen=8)


def wait_until(address: str, serving: bool) -> None:
    """Waits for the health service there to say so."""
    wanted = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for response in stub.Watch(HealthCheckRequest(), timeout=TIMEOUT):
            if response.status == wanted:
                return


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
        wait_until(self.address, serving)

    def inspect(self) -> psutil.Process:
        """To look at it from outside."""
        return psutil.Process(self._process.pid)

    @property
    def resident_bytes(self) -> int:
        """Its memory; fails when it has died."""
        resident: int = self.inspect().memory_info().rss
        return resident

    def terminate(self) -> None:
        """Asks it to end, once: a second signal would not let it drain."""
        if not self._terminated:
            self._terminated = True
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # where a test has stopped it

    def send(self, signum: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to it, or to the process of one of its shards."""
        if rank is None:
            self._process.send_signal(signum)
            return
        [shard] = [
            child for child in self.inspect().children() if child.environ().get("RANK") == str(rank)
        ]
        shard.send_signal(signum)

    @contextmanager
    def again(self) -> Iterator["ServiceProcess"]:
        """After its end: the same service at the same address, until the block ends."""
        flags = {**self._flags, "port": self.address.rpartition(":")[2]}
        process = ServiceProcess(self.name, *self._command, **flags)
        try:
            yield process
        finally:
            process.stop()

    def kill(self) -> None:
        """Ends it without a warning."""
        self._terminated = True
        os.killpg(self._process.pid, signal.SIGKILL)
        self.stop()

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
            _ended.append(self)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if '"event": "serving metrics"' in line and not self._metrics_address.done():
                self._metrics_address.set_result(json.loads(line)["address"])
            if '"event": "listening"' in line and not self._address.done():
                self._address.set_result(json.loads(line)["address"])
        if not self._address.done():
            self._address.set_exception(RuntimeError(f"{self.name} ended before it listened"))


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path

    @classmethod
    def issue(cls, authority: trustme.CA, folder: Path, **attributes: Any) -> "Certificate":
        issued = authority.issue_cert("localhost", "127.0.0.1", **attributes)
        name = uuid.uuid4().hex
        files = cls(folder / f"{name}.cert.pem", folder / f"{name}.key.pem")
        files.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        return files

    def tls(self, ca: Path) -> Tls:
        return Tls(ca, self.cert, self.key)


@dataclass(frozen=True, slots=True)
class LockedGateway:
    """A gateway that asks for a client certificate and an API key, and what opens it."""

    process: ServiceProcess
    authority: trustme.CA
    ca: Path
    tls: Tls
    key: str

    def client(self) -> Client:
        return Client(self.process.address, tls=self.tls, api_key=self.key)

    @property
    def health_address(self) -> str:
        lines = (json.loads(line) for line in self.process.log if '"health_address"' in line)
        return str(next(lines)["health_address"])

    @property
    def port(self) -> int:
        return int(self.process.address.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Stack:
    """All services, serving."""

    tokenizer: ServiceProcess
    model: ServiceProcess
    gateway: ServiceProcess


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def start_tokenizer(**flags: object) -> ServiceProcess:
    flags = {"tokenizer_path": GOLDEN / "tokenizer.model", **flags}
    return ServiceProcess("tokenizer_service", "-m", "tokenizer_service", **flags)


def start_model(checkpoint: str, shards: int, **flags: object) -> ServiceProcess:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--max_restarts", 2)
    if shards > 1:
        # The address must be the same after a restart.
        flags = {"port": unused_port(), **flags}
    return ServiceProcess(
        "model_service",
        *((*torchrun, "--nproc_per_node", shards) if shards > 1 else ()),
        *("-m", "model_service"),
        ckpt_dir=GOLDEN / "checkpoints" / checkpoint,
        tokenizer_path=GOLDEN / "tokenizer.model",
        max_seq_len=CONTEXT_LENGTH,
        threads=1,
        **flags,
    )


def start_gateway(
    tokenizer: ServiceProcess, *models: ServiceProcess, **flags: object
) -> ServiceProcess:
    return ServiceProcess(
        "gateway",
        *("-m", "gateway"),
        tokenizer_target=tokenizer.address,
        model_targets=",".join(model.address for model in models),
        **flags,
    )


@dataclass(frozen=True, slots=True)
class Fleet:
    """All services, serving, with several replicas and perhaps several gateways."""

    tokenizer: ServiceProcess
    models: list[ServiceProcess]
    gateways: list[ServiceProcess]

    @property
    def gateway(self) -> ServiceProcess:
        return self.gateways[0]

    def wait_for_replicas(self, count: int) -> None:
        """Waits until every gateway sees so many."""
        for gateway in self.gateways:
            with grpc.insecure_channel(gateway.address) as channel:
                stub = chat_pb2_grpc.ChatServiceStub(channel)
                # The session of a replica that serves is about to begin; nothing tells when it has.
                while _replicas(stub) < count:
                    time.sleep(0.05)


def _replicas(stub: "chat_pb2_grpc.ChatServiceStub") -> int:
    try:
        return stub.GetModel(chat_pb2.GetModelRequest(), wait_for_ready=True).replicas
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return 0


@contextmanager
def run_fleet(
    replicas: int, shards: int = 1, gateways: int = 1, **gateway_flags: object
) -> Iterator[Fleet]:
    """Replicas of one checkpoint behind gateways, until the block ends."""
    with ExitStack() as ending:

        def started(process: ServiceProcess) -> ServiceProcess:
            ending.callback(process.stop)
            return process

        models = [
            started(start_model("gqa-mp1", shards, max_batch_size=64)) for _ in range(replicas)
        ]
        tokenizer = started(start_tokenizer())
        front = [
            started(start_gateway(tokenizer, *models, **gateway_flags)) for _ in range(gateways)
        ]
        fleet = Fleet(tokenizer, models, front)
        fleet.wait_for_replicas(replicas)
        yield fleet


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
def fleet() -> Callable[..., AbstractContextManager[Fleet]]:
    """Starts several replicas and gateways for a test that ends some of them."""
    return run_fleet


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The stack that most tests share."""
    with run_services("mha-mp1", max_batch_size=32) as running:
        yield running


@pytest.fixture(scope="session")
def locked(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedGateway]:
    """A further gateway in front of the shared services."""
    folder = tmp_path_factory.mktemp("locked")
    authority, key = trustme.CA(), "a key that is long enough"
    ca, keys = folder / "ca.pem", folder / "keys.toml"
    authority.cert_pem.write_to_path(ca)
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys.write_text(f'[[keys]]\nname = "friend"\nsha256 = "{digest}"\n')
    own = Certificate.issue(authority, folder)
    tls = {"tls_cert": own.cert, "tls_key": own.key, "tls_client_ca": ca}
    flags = {"health_port": 0, "api_keys": keys, "receive_timeout": 2}
    process = start_gateway(stack.tokenizer, stack.model, **tls, **flags)
    try:
        _ = process.address
        friend = Certificate.issue(authority, folder).tls(ca)
        gateway = LockedGateway(process, authority, ca, friend, key)
        wait_until(gateway.health_address, serving=True)
        yield gateway
    finally:
        process.stop()


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
def own_gateway(gateway_beside: Callable[..., ServiceProcess]) -> ServiceProcess:
    """One more gateway in front of the shared services, for a test that ends it."""
    return gateway_beside()


@pytest.fixture
def demo_services() -> Iterator[Callable[..., Stack]]:
    """Starts a stack on the demonstration checkpoint, the gateway with flags of the test."""
    files = {"ckpt_dir": DEMO, "tokenizer_path": DEMO / "tokenizer.model"}
    with ExitStack() as ending:

        def start(max_batch_size: int, **gateway_flags: object) -> Stack:
            def started(process: ServiceProcess) -> ServiceProcess:
                ending.callback(process.stop)
                return process

            command = ("-m", "model_service")
            flags = {**files, "threads": 1, "max_batch_size": max_batch_size}
            model = started(ServiceProcess("model_service", *command, **flags))
            command = ("-m", "tokenizer_service")
            flags = {"tokenizer_path": files["tokenizer_path"]}
            tokenizer = started(ServiceProcess("tokenizer_service", *command, **flags))
            gateway = started(start_gateway(tokenizer, model, **gateway_flags))
            gateway.wait_until(serving=True)
            return Stack(tokenizer, model, gateway)

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


@pytest.fixture
def idle_load(
    model_service: "model_pb2_grpc.ModelServiceAsyncStub",
) -> Callable[[], Awaitable[model_pb2.GetLoadResponse]]:
    """Waits until no sequence runs or waits; returns the load report of then."""

    async def until_idle() -> model_pb2.GetLoadResponse:
        while True:
            load = await model_service.GetLoad(model_pb2.GetLoadRequest())
            if load.running_sequences == load.waiting_sequences == 0:
                return load

    return until_idle


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last log lines of what runs to the report of a failure."""
    report = yield
    if report.failed:
        report.sections += [
            (f"log of {each.name}", "".join(each.log[-20:])) for each in (*_ended, *_running)
        ]
    return report
