"""Running services for tests. The logs of whatever runs are shown with a test that fails."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import grpc
import pytest
import trustme

from llama.v1 import chat_pb2_grpc, model_pb2, model_pb2_grpc
from tests.e2e.deployments import Certificate, Fleet, LockedGateway, Stack, run_fleet, run_services
from tests.e2e.processes import ServiceProcess, ended, running, start_gateway, wait_until

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"


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
            (f"log of {each.name}", "".join(each.log[-20:])) for each in (*ended, *running)
        ]
    return report
