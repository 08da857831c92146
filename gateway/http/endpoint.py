"""The frame around each endpoint: caller, request id, errors, metrics, log and trace.

Its parts are those of gRPC's calls (serving.intake), so both kinds of calls are counted, logged and
refused alike.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from gateway.http.exchange import ClientGoneError, Exchange
from gateway.http.rate_limits import KeyQuota, rate_limit_headers
from serving.errors import RequestError, clear_frames
from serving.intake.answering import Call
from serving.intake.interceptor import EARLY_END_LOG_SECONDS, Authorize
from serving.intake.receive_budget import Reserve
from serving.security import caller
from serving.server import Intake
from serving.telemetry import request_id, tracing
from serving.telemetry.rate_limited_log import RateLimitedLog

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Door:
    """The parts that all endpoints share."""

    intake: Intake
    authorize: Authorize | None
    key_quotas: Callable[[], Iterable[KeyQuota]]  # those of the current caller
    early_ends: RateLimitedLog = field(
        default_factory=lambda: RateLimitedLog(EARLY_END_LOG_SECONDS)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """An ASGI application for one operation of the API.

    name: of the operation, in logs.
    like: the gRPC method that does the same. A caller needs the same permission, and the metrics
        count both; None: there is none, and no key is needed.
    handle: answers a request, given its parsed body if `read` is set.
    read: parses the body; without it, a request has none.
    """

    door: Door
    name: str
    like: str | None
    handle: Callable[..., Awaitable[None]]
    read: Callable[[bytes], object] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        intake = self.door.intake
        metadata = Headers(scope=scope).items()
        call_id = request_id.from_metadata(metadata)
        method = f"/http/{self.name}"
        metrics = intake.calls.method(self.like or method, "http")
        call = Call(method, call_id, metrics, self.door.early_ends)
        exchange = Exchange(
            *(scope, receive, send, call_id),
            max_bytes=intake.settings.max_request_bytes,
            headers_of_caller=lambda: rate_limit_headers(self.door.key_quotas()),
        )
        with (
            structlog.contextvars.bound_contextvars(**{request_id.CONTEXT_KEY: call_id}),
            contextlib.ExitStack() as during_call,
        ):
            async with answering(call, exchange):
                if self.door.authorize is not None and self.like is not None:
                    caller.identify(self.door.authorize(self.like, metadata))
                during_call.enter_context(tracing.call(method, metadata, "http"))
                reserve = during_call.enter_context(intake.receiver.reservation())
                await self._answer(call, exchange, reserve)

    async def _answer(self, call: Call, exchange: Exchange, reserve: Reserve) -> None:
        arguments: list[Any] = []
        if self.read is not None:
            arguments = [await self._body(exchange, self.read, reserve)]
        call.accepted = True
        async with exchange.until_client_leaves():
            # Not in a variable during the call: a body can have megabytes.
            await self.handle(exchange, *(arguments.pop() for _ in range(len(arguments))))

    async def _body(
        self, exchange: Exchange, read: Callable[[bytes], object], reserve: Reserve
    ) -> object:
        receiver = self.door.intake.receiver
        return await receiver.parse(await receiver.read(exchange), read, reserve)


@contextlib.asynccontextmanager
async def answering(call: Call, exchange: Exchange) -> AsyncIterator[None]:
    """Around an endpoint's own code: sends errors, counts the call and logs its end."""
    started, code = time.monotonic(), grpc.StatusCode.OK
    call.metrics.begin()
    try:
        yield
    except (ClientGoneError, asyncio.CancelledError) as error:
        code = grpc.StatusCode.CANCELLED
        clear_frames(error)
    except RequestError as error:
        code = error.code
        call.metrics.refuse(error)
        clear_frames(error)
        await exchange.fail(error)
    except Exception as error:
        code = grpc.StatusCode.INTERNAL
        _log.exception("call failed", method=call.method)
        clear_frames(error)
        await exchange.fail(RequestError(code, f"internal error, request id {call.id}"))
    finally:
        call.end(code, time.monotonic() - started, status=exchange.status)
