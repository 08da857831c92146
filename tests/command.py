"""Fixtures that the tests of the client and of the `chasqui` command share.

They run the command, all services on a golden checkpoint, and gateways whose answers a test writes.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Protocol, cast

import grpc
import pytest

from llama.v1 import chat_pb2
from tests.scripted_gateway import Behaviour, StartGateway, Unfinished, chat_event, handler

GOLDEN = Path(__file__).parent / "golden"
CHASQUI = str(Path(sys.executable).with_name("chasqui"))


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
            handlers = {name: handler(name, behaviour) for name, behaviour in methods.items()}
            service = grpc.method_handlers_generic_handler("llama.v1.ChatService", handlers)
            server.add_generic_rpc_handlers((service,))
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(None).wait())
            return f"127.0.0.1:{port}"

        yield start


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
        yield chat_event(1, started=chat_pb2.Started(seed=1))
        yield chat_event(2, delta=chat_pb2.Delta(text="word"))
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
