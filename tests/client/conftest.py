"""Real servers of two kinds: all services on a golden checkpoint, and gateways made to fail."""

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, cast

import grpc
import pytest

from client import AsyncClient, Client, Model
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_STOP

GOLDEN = Path(__file__).parents[1] / "golden"
CHASQUI = str(Path(sys.executable).with_name("chasqui"))
GetModel = Callable[[str], Model]
Behaviour = Callable[[Any, grpc.ServicerContext], Any]
_METHODS = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods_by_name


class StartGateway(Protocol):
    def __call__(self, **methods: Behaviour) -> str: ...


@dataclass(frozen=True)
class Unfinished:
    target: str
    cancelled: threading.Event
    names: list[str]  # of the streams begun
    cancelled_names: list[str]


class Scripted:
    """A gateway that answers each dialog with the next texts, and keeps the contents of dialogs."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.dialogs: list[list[str]] = []
        self._answers = iter(answers)

    def stream(
        self, request: chat_pb2.ChatCompleteStreamRequest, _context: grpc.ServicerContext
    ) -> Iterator[chat_pb2.ChatCompleteStreamResponse]:
        self.dialogs.append([message.content for message in request.dialogs[0].messages])
        yield numbered(1, started=chat_pb2.Started(seed=1))
        number = 1
        for number, text in enumerate(next(self._answers), start=2):
            yield numbered(number, delta=chat_pb2.Delta(text=text))
        finished = chat_pb2.Finished(finish_reason=FINISH_REASON_STOP)
        yield numbered(number + 1, finished=finished)


def numbered(number: int, **event: Any) -> chat_pb2.ChatCompleteStreamResponse:
    """An event of a chat stream."""
    return chat_pb2.ChatCompleteStreamResponse(
        event=chat_pb2.StreamEvent(event_number=number, **event)
    )


class Serve(Protocol):
    def __call__(
        self, *flags: str
    ) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]: ...


class Spawn(Protocol):
    def __call__(
        self, *arguments: str, **streams: int
    ) -> AbstractContextManager[subprocess.Popen[str]]: ...


class Run(Protocol):
    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def start_gateway() -> Iterator[StartGateway]:
    """Starts a server for the ChatService methods that are given; returns its address."""
    with ExitStack() as stack:

        def start(**methods: Behaviour) -> str:
            workers = stack.enter_context(futures.ThreadPoolExecutor(4))
            server = grpc.server(workers)
            handlers = {name: _handler(name, behaviour) for name, behaviour in methods.items()}
            service = grpc.method_handlers_generic_handler("llama.v1.ChatService", handlers)
            server.add_generic_rpc_handlers((service,))
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(None).wait())
            return f"127.0.0.1:{port}"

        yield start


def _handler(name: str, behaviour: Behaviour) -> "grpc.RpcMethodHandler[Any, Any]":
    request = getattr(chat_pb2, f"{name}Request")
    response = getattr(chat_pb2, f"{name}Response")
    kind = (
        grpc.unary_stream_rpc_method_handler
        if _METHODS[name].server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return kind(behaviour, request.FromString, response.SerializeToString)


@pytest.fixture(params=["sync", "asyncio"])
def get_model(request: pytest.FixtureRequest) -> GetModel:
    """`get_model` of either client."""

    def with_sync(target: str) -> Model:
        with Client(target) as client:
            return client.get_model(timeout=10)

    async def with_asyncio(target: str) -> Model:
        async with AsyncClient(target) as client:
            return await client.get_model(timeout=10)

    return (
        with_sync if request.param == "sync" else lambda target: asyncio.run(with_asyncio(target))
    )


@pytest.fixture
def unfinished(start_gateway: StartGateway) -> Unfinished:
    """A gateway whose answers are one word, and then nothing more until they are cancelled."""
    cancelled = threading.Event()
    names: list[str] = []
    cancelled_names: list[str] = []

    def answer(
        request: chat_pb2.ChatCompleteStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[chat_pb2.ChatCompleteStreamResponse]:
        context.add_callback(cancelled.set)
        names.append(request.stream_name)
        yield numbered(1, started=chat_pb2.Started(seed=1))
        yield numbered(2, delta=chat_pb2.Delta(text="word"))
        cancelled.wait()

    def cancel(
        request: chat_pb2.CancelStreamRequest, _context: grpc.ServicerContext
    ) -> chat_pb2.CancelStreamResponse:
        cancelled_names.append(request.stream_name)
        return chat_pb2.CancelStreamResponse()

    target = start_gateway(ChatCompleteStream=answer, CancelStream=cancel)
    return Unfinished(target, cancelled, names, cancelled_names)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of all services on a golden checkpoint, as `chasqui serve` runs them."""
    with _serving(tmp_path_factory.mktemp("services") / "log") as (_, address):
        yield address


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Starts services for one test: the process of `chasqui serve` and the gateway's address."""
    return partial(_serving, tmp_path / "log")


@pytest.fixture(scope="session")
def spawn() -> Spawn:
    """Starts the `chasqui` command, its streams piped if not given; ended with the block."""
    return _spawned


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs the `chasqui` command to its end, with `stdin` on its standard input."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        with _spawned(*arguments) as process:
            stdout, stderr = process.communicate(stdin)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    return run


@contextmanager
def _serving(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    checkpoint = {
        "ckpt_dir": GOLDEN / "checkpoints" / "gqa-mp1",
        "tokenizer_path": GOLDEN / "tokenizer.model",
        "max_seq_len": 256,
        "port": 0,
        "log_file": log,
    }
    arguments = [f"--{name}={value}" for name, value in checkpoint.items()]
    with _spawned("serve", *arguments, *flags) as process:
        output = ""
        for line in cast("IO[str]", process.stdout):
            output += line
            if found := re.search(r"Serving at (\S+)\. ", line):
                yield process, found[1]
                break
        else:
            pytest.fail(f"chasqui serve ended early: {output}{log.read_text()}")


@contextmanager
def _spawned(*arguments: str, **streams: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [CHASQUI, *arguments],
        text=True,
        stdin=streams.get("stdin", subprocess.PIPE),
        stdout=streams.get("stdout", subprocess.PIPE),
        stderr=streams.get("stderr", subprocess.PIPE),
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
