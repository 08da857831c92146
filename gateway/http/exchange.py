"""One HTTP request and its answer: reading within bounds, writing, and a client that leaves.

It stands in for gRPC's context, so the receiver and the pipeline treat it as any call.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from email.utils import formatdate
from typing import Any

import grpc
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from gateway.http.openai.errors import error_answer
from serving.errors import RequestError, resource_exhausted
from serving.telemetry import request_id

JSON = "application/json"
EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events otherwise
}
# The wait for a client that does not read its error; then the connection is cut.
_ERROR_SECONDS = 5.0


class ClientGoneError(Exception):
    """The client has closed the connection."""


class Exchange:
    """The request at `scope`, and its answer."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        call_id: str,
        *,
        max_bytes: int,
        headers_of_caller: Callable[[], Mapping[str, str]],
    ) -> None:
        self.headers = Headers(scope=scope)
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.status = 0  # until the answer begins
        self._scope = scope
        self._receive = receive
        self._send = send
        self._call_id = call_id
        self._max_bytes = max_bytes
        self._headers_of_caller = headers_of_caller

    def peer(self) -> str:
        """The client's address, as gRPC writes it."""
        host, port = self._scope.get("client") or ("", 0)
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def time_remaining(self) -> float | None:
        """None: HTTP has no deadlines."""
        return None

    async def read(self) -> bytes:
        """The body.

        Raises:
            RequestError: it is no JSON by its type, or larger than allowed.
        """
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            # Also keeps pages of other sites out: a browser asks before it sends this type.
            message = f"the body must be JSON, with the header 'Content-Type: {JSON}'"
            raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)
        if int(self.headers.get("content-length", 0)) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            part = await self._receive()
            if part["type"] == "http.disconnect":
                raise ClientGoneError
            body += part["body"]
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not part.get("more_body"):
                return bytes(body)

    @contextlib.asynccontextmanager
    async def until_client_leaves(self) -> AsyncIterator[None]:
        """Cancels the block when the client closes the connection; call after `read`.

        Raises:
            ClientGoneError: it did.
        """
        task, gone = asyncio.current_task(), False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            if task is not None:
                task.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not gone or task is None:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            watching.cancel()

    async def answer(
        self, body: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a complete answer; `body` becomes JSON."""
        content = to_json(body)
        length = {"content-type": JSON, "content-length": str(len(content))}
        await self._begin(status, {**length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": content})

    async def stream(self, events: AsyncGenerator[bytes, None]) -> None:
        """Sends events as they come, and closes them; an error before the first has its status."""
        async with contextlib.aclosing(events):
            first = await anext(events)
            await self._begin(200, EVENT_STREAM)
            await self._write(first)
            async for event in events:
                await self._write(event)
        await self._end()

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        own = {
            "date": formatdate(usegmt=True),
            request_id.METADATA_KEY: self._call_id,
            **self._headers_of_caller(),
        }
        encoded = [
            (k.encode("latin-1"), v.encode("latin-1")) for k, v in {**own, **headers}.items()
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _write(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: RequestError) -> None:
        """Sends an error: with its status, or as the last event of a stream that has begun."""
        answer = error_answer(error)
        try:
            async with asyncio.timeout(_ERROR_SECONDS):
                if not self.status:
                    await self.answer(answer.body, answer.status, answer.headers)
                    return
                await self._write(b"data: %s\n\n" % to_json(answer.body))
                await self._end()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Cuts the connection."""
        state: dict[str, Any] = self._scope["state"]
        state["abort"]()

    def _too_large(self) -> RequestError:
        message = f"the body has more than {self._max_bytes} bytes"
        return resource_exhausted(message, "max_request_bytes", retry_after=None)
