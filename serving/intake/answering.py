"""How a call is answered: its ids, the status of an error, its log line and its metrics."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import grpc
import structlog

from serving.errors import RequestError, clear_frames, to_status
from serving.telemetry import request_id, tracing
from serving.telemetry.metrics import MethodMetrics
from serving.telemetry.rate_limited_log import RateLimitedLog

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_log = structlog.stdlib.get_logger(__name__)

# The metadata in which gRPC's libraries expect a google.rpc.Status.
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# Milliseconds that gRPC's own retries wait: "gRPC Retry Design", A6.
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# Called every few seconds by orchestrators and gateways; logged at debug level only.
INFRASTRUCTURE = (
    *("/grpc.health.", "/grpc.reflection.", "/llama.v1.ModelService/GetLoad"),
    "/http/health",
)

# The statuses for a caller without a key or permission.
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

# The wait for a caller that does not read its refusal; after it gRPC alone keeps the refusal.
_ABORT_SECONDS = 5.0


@dataclass(slots=True)
class Call:
    """One call, from its beginning to its status."""

    method: str
    id: str
    metrics: MethodMetrics
    early_ends: RateLimitedLog | None  # None if an early end is normal
    # True once the caller is authorized and the first request has arrived. Only such a call has a
    # log line of its own, because beginning and resetting calls costs a client little and no key.
    accepted: bool = field(default=False, init=False)

    def end(self, code: grpc.StatusCode, seconds: float, **details: object) -> None:
        """Counts and logs its end; `details` are further fields of its log line."""
        self.metrics.end(code, seconds)
        tracing.end_call(code)
        infrastructure = self.method.startswith(INFRASTRUCTURE)
        log = _log.info if self.accepted and not infrastructure else _log.debug
        log(
            "call finished",
            method=self.method,
            code=code.name,
            seconds=round(seconds, 6),
            **details,
        )
        # `authorize` logs its refusals itself.
        if self.early_ends and not (self.accepted or infrastructure or code in _REFUSED):
            event = "calls end before their request arrives"
            self.early_ends.warn(_log, event, method=self.method, code=code.name)


@contextlib.asynccontextmanager
async def answering(call: Call, context: Context) -> AsyncIterator[None]:
    """Around the service's own code: sends the ids, turns errors to statuses, logs the end."""
    started = time.monotonic()
    call.metrics.begin()
    identity = ((request_id.METADATA_KEY, call.id),)
    code = grpc.StatusCode.OK
    try:
        context.set_trailing_metadata(identity)
        await context.send_initial_metadata(identity)
        yield
        code = _code_set_on(context) or code
    except asyncio.CancelledError as error:
        clear_frames(error)
        expired = context.time_remaining() == 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
        raise
    except grpc.aio.BaseError as error:  # the service called abort, or the client is gone
        clear_frames(error)
        code = _code_set_on(context) or grpc.StatusCode.CANCELLED
        raise
    except RequestError as error:
        code = error.code
        call.metrics.refuse(error)
        status = to_status(error)
        details = (STATUS_DETAILS_KEY, status.SerializeToString())
        clear_frames(error)
        await _abort(context, code, status.message, (*identity, details, *_pushback(error)))
    except Exception as error:
        code = grpc.StatusCode.INTERNAL
        _log.exception("call failed", method=call.method)
        clear_frames(error)
        await _abort(context, code, f"internal error, request id {call.id}", identity)
    finally:
        call.end(code, time.monotonic() - started)


async def _abort(
    context: Context,
    code: grpc.StatusCode,
    message: str,
    trailing_metadata: tuple[tuple[str, str | bytes], ...],
) -> None:
    """Ends the call by raising, like gRPC's own, but does not wait for ever until it is read."""
    try:
        async with asyncio.timeout(_ABORT_SECONDS):
            await context.abort(code, message, trailing_metadata)
    except TimeoutError:
        raise asyncio.CancelledError from None


def _pushback(error: RequestError) -> tuple[tuple[str, str], ...]:
    if error.retry_after is None:
        return ()
    return ((PUSHBACK_KEY, str(math.ceil(error.retry_after * 1000))),)


def _code_set_on(context: Context) -> grpc.StatusCode | None:
    return cast("grpc.StatusCode | None", context.code())  # None if the service has set none
