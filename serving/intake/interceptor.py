"""The interceptor around every call: caller, request id, errors to statuses, log, metrics, trace.

gRPC calls `intercept_service` before it reads the request; it returns a handler that wraps the
service's own. That handler is always a coroutine, also if the service's is an async generator, so
that a cancelled stream closes its generator at once and not only when it is garbage-collected. It
always takes a stream of requests, because gRPC calls such a handler before the first one arrives: a
caller without a key is refused at once, and a request that does not arrive can time out.
"""

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
import structlog

from serving.intake.answering import INFRASTRUCTURE, Call, Context, answering
from serving.intake.receive_budget import Reserve
from serving.intake.receiver import Parse, Receiver, checked
from serving.security import caller
from serving.telemetry import request_id, tracing
from serving.telemetry.metrics import CallMetrics
from serving.telemetry.rate_limited_log import RateLimitedLog

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_log = structlog.stdlib.get_logger(__name__)

# The names of go-grpc-prometheus.
_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
# Calls that end before their request arrives: at most one log line in this time.
EARLY_END_LOG_SECONDS = 10.0
# Returns the caller, given method and metadata; raises RequestError if the call is not allowed.
Serialize = Callable[[object], bytes]
Authorize = Callable[[str, Iterable[tuple[str, str | bytes]]], caller.Caller]


@dataclass(frozen=True, slots=True)
class _Requests:
    """A call's stream of requests; the first one marks the call as accepted."""

    requests: AsyncIterator[object]
    call: Call

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        request = await anext(self.requests)
        self.call.accepted = True
        return request


class CallInterceptor(grpc.aio.ServerInterceptor):
    def __init__(
        self, metrics: CallMetrics, receiver: Receiver, authorize: Authorize | None = None
    ) -> None:
        self._metrics = metrics
        self._receiver = receiver
        self._authorize = authorize
        self._early_ends = RateLimitedLog(EARLY_END_LOG_SECONDS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return None
        streams = handler.request_streaming, handler.response_streaming
        method = handler_call_details.method
        metadata = handler_call_details.invocation_metadata
        call_id = request_id.from_metadata(metadata)
        metrics = self._metrics.method(method, _KINDS[streams])
        # A session may end before its first request; that needs no warning.
        call = Call(method, call_id, metrics, None if streams[0] else self._early_ends)
        # A stream of requests is a session, and its requests have traces of their own.
        traced = not (handler.request_streaming or method.startswith(INFRASTRUCTURE))
        parse = cast("Parse", handler.request_deserializer)

        async def respond(requests: AsyncIterator[object], context: Context) -> object:
            with (
                structlog.contextvars.bound_contextvars(**{request_id.CONTEXT_KEY: call_id}),
                contextlib.ExitStack() as during_call,
            ):
                async with answering(call, context):
                    if self._authorize is not None:
                        caller.identify(self._authorize(method, metadata))
                    if traced:  # after authorization: a traceparent can add to others' traces
                        during_call.enter_context(tracing.call(method, metadata))
                    if handler.request_streaming:
                        return await _call(handler, _Requests(requests, call), context)
                    reserve = during_call.enter_context(self._receiver.reservation())
                    # Not in a variable: in an error's traceback this frame outlives the call.
                    return await _call(
                        handler, await self._received(call, parse, context, reserve), context
                    )

        # A malformed request must fail within `respond`. A single one arrives there as bytes; those
        # of a stream are parsed while the service reads.
        factory = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return factory(
            respond,
            request_deserializer=checked(parse) if handler.request_streaming else None,
            response_serializer=_unless_serialized(handler.response_serializer),
        )

    async def _received(
        self, call: Call, parse: Parse, context: Context, reserve: Reserve
    ) -> object:
        serialized = await self._receiver.read(context)
        call.accepted = True
        return await self._receiver.parse(serialized, parse, reserve)


def _unless_serialized(serialize: "Serialize | None") -> "Serialize":
    """Lets a service return bytes, which a message that several calls get costs only once."""

    def serializer(response: object) -> bytes:
        if isinstance(response, bytes) or serialize is None:
            return cast("bytes", response)
        return serialize(response)

    return serializer


async def _call(handler: Handler, request: object, context: Context) -> object:
    behavior = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    # The types of grpcio have only the handlers of its synchronous servers.
    result = cast("Callable[[object, Context], Any]", behavior)(request, context)
    # A service may drop its request before its answer ends, so this frame must not keep it.
    del request
    if not inspect.isasyncgen(result):
        return await result
    async with contextlib.aclosing(result) as responses:
        async for response in responses:
            await context.write(response)
    return None
