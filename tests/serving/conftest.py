"""A service with one method of each kind, a way to call it, and its log as an operator reads it."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue

from serving.errors import Violation, invalid_argument, resource_exhausted
from serving.server import Service, channel, running
from serving.settings import ServerSettings
from serving.telemetry import logs, request_id

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@dataclass
class Echo:
    """Sends back what it gets; `refuse` and `boom` fail, `hold` waits until it is released."""

    held: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    request_ids: list[str | None] = field(default_factory=list)

    async def unary_unary(self, request: StringValue, _context: object) -> StringValue:
        return await self._answer(request)

    async def unary_stream(
        self, request: StringValue, _context: object
    ) -> AsyncIterator[StringValue]:
        try:
            yield await self._answer(request)
            while request.value == "endless":
                yield request
        finally:
            self.closed.set()

    async def stream_unary(
        self, requests: AsyncIterator[StringValue], _context: object
    ) -> StringValue:
        answers = [await self._answer(request) async for request in requests]
        return StringValue(value="".join(answer.value for answer in answers))

    async def stream_stream(
        self, requests: AsyncIterator[StringValue], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        async for request in requests:
            await context.write(await self._answer(request))

    async def _answer(self, request: StringValue) -> StringValue:
        self.request_ids.append(request_id.current())
        match request.value:
            case "refuse":
                raise invalid_argument([Violation("value", "must not be 'refuse'")])
            case "exhaust":
                raise resource_exhausted("the queue is full", "max_queued_sequences")
            case "boom":
                raise RuntimeError("a secret of the server")
            case "hold":
                self.held.set()
                await self.released.wait()
        return request

    def service(self) -> Service:
        methods = {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(
                getattr(self, kind), StringValue.FromString, StringValue.SerializeToString
            )
            for kind in KINDS
        }
        handler = grpc.method_handlers_generic_handler("test.Echo", methods)
        return Service(
            names=["test.Echo"],
            register=lambda server: server.add_generic_rpc_handlers((handler,)),
        )


@dataclass(frozen=True)
class Outcome:
    """How a call ended, as its client sees it."""

    code: grpc.StatusCode
    details: str
    texts: list[str]
    initial_metadata: dict[str, str | bytes]
    trailing_metadata: dict[str, str | bytes]
    call: grpc.aio.Call


class Call(Protocol):
    def __call__(
        self, kind: str, text: str | bytes, request_id: str | None = None
    ) -> Awaitable[Outcome]: ...


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def servers() -> AsyncIterator[AsyncExitStack]:
    """Holds the servers that a test starts; closing it drains them."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def echo_channel(servers: AsyncExitStack, echo: Echo) -> AsyncIterator[grpc.aio.Channel]:
    settings = ServerSettings(metrics_port=0)
    server = await servers.enter_async_context(running(settings, echo.service()))
    async with channel(server.address) as to_server:
        yield to_server


@pytest.fixture
def call(echo_channel: grpc.aio.Channel) -> Call:
    """Calls a method of the given kind with one text (or with bytes as they are) to its end."""

    async def call(kind: str, text: str | bytes, request_id: str | None = None) -> Outcome:
        method = getattr(echo_channel, kind)(f"/test.Echo/{kind}", None, StringValue.FromString)
        raw = text if isinstance(text, bytes) else StringValue(value=text).SerializeToString()
        request = iter([raw]) if kind.startswith("stream") else raw
        metadata = () if request_id is None else (("x-request-id", request_id),)
        call = method(request, metadata=metadata)
        texts = []
        try:
            if kind.endswith("stream"):
                texts = [response.value async for response in call]
            else:
                texts = [(await call).value]
        except grpc.aio.AioRpcError:
            pass  # `code` and `details` tell the same
        return Outcome(
            await call.code(),
            await call.details(),
            texts,
            dict(await call.initial_metadata()),
            dict(await call.trailing_metadata()),
            call,
        )

    return call


@pytest.fixture
def configure_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Configures logging with the given settings; returns what stands for stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure(**settings: Any) -> io.StringIO:
        stderr = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            logs.configure(ServerSettings(**settings))
        return stderr

    yield configure
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def logged(configure_logs: Callable[..., io.StringIO]) -> Callable[[], list[dict[str, Any]]]:
    """The log lines of the test so far, parsed."""
    stderr = configure_logs(log_format="json")
    return lambda: [json.loads(line) for line in stderr.getvalue().splitlines()]
