"""The tokenizer service as its own process, and stubs to talk to it."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from sentencepiece import SentencePieceProcessor

from llama.v1.tokenizer_pb2 import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse
from llama.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import Tokenizer


@dataclass
class Process:
    popen: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def wait_for(self, event: str) -> dict[str, Any]:
        """Reads its log up to the first line of this event."""
        assert self.popen.stderr is not None
        for text in self.popen.stderr:
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"the process ended without {event!r}: {self.lines}")

    def wait(self) -> int:
        """Reads the rest of its log; returns the exit status."""
        assert self.popen.stderr is not None
        self.lines += [json.loads(text) for text in self.popen.stderr]
        return self.popen.wait()

    def ignore_log(self) -> None:
        """Reads on in the background, because a process stops when the pipe of its log is full."""
        assert self.popen.stderr is not None
        threading.Thread(target=deque, args=(self.popen.stderr, 0), daemon=True).start()


Launch = Callable[..., Process]


@pytest.fixture(scope="session")
def model_path() -> Path:
    return Path(__file__).parents[1] / "golden" / "tokenizer.model"


@pytest.fixture(scope="session")
def reference(model_path: Path) -> SentencePieceProcessor:
    """SentencePiece itself, to compare with."""
    return SentencePieceProcessor(model_file=str(model_path))


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return open_tokenizer(model_path)


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Starts `python -m tokenizer_service` with these flags and variables."""
    command = [sys.executable, "-m", "tokenizer_service", "--log_format", "json"]
    with ExitStack() as stack:

        def launch(*flags: str | Path, **variables: str) -> Process:
            popen = subprocess.Popen(
                [*command, *map(str, flags)],
                env=os.environ | variables,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            return Process(popen)

        yield launch


@pytest.fixture(scope="session")
def channel(launch: Launch, model_path: Path) -> Iterator[grpc.Channel]:
    """To a server that all tests share."""
    process = launch("--tokenizer_path", model_path, "--port", "0")
    address = process.wait_for("listening")["address"]
    process.ignore_log()
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture(scope="session")
def begin() -> Callable[[grpc.Channel, EncodeRequest | DecodeRequest], Any]:
    """Starts the call that takes this request, and returns when the server works on it.

    The call is made as a streaming one, which is the same on the wire: of a unary one, gRPC reports
    the initial metadata (which the server sends when it begins) together with the answer only.
    """

    def begin(channel: grpc.Channel, request: EncodeRequest | DecodeRequest) -> Any:
        encodes = isinstance(request, EncodeRequest)
        method: Any = channel.unary_stream(
            f"/llama.v1.TokenizerService/{'Encode' if encodes else 'Decode'}",
            type(request).SerializeToString,
            (EncodeResponse if encodes else DecodeResponse).FromString,
        )
        call = method(request)
        call.initial_metadata()
        return call

    return begin


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> TokenizerServiceStub:
    return TokenizerServiceStub(channel)
