"""Traces of requests over all services, by OpenTelemetry's API; off unless the settings name an
OTLP collector. Its SDK, which makes and exports spans, is imported only then: without it the API
does nothing. Spans hold ids, sizes and times, never what users wrote.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.settings import ServerSettings
from serving.telemetry import request_id

TRACEPARENT = "traceparent"  # the W3C's name for the trace and span that a call belongs to

# The statuses that OpenTelemetry's conventions call a server's error; others are the client's.
_SERVER_ERRORS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}

_tracer = trace.get_tracer("chasqui")
_propagator = TraceContextTextMapPropagator()


@contextlib.asynccontextmanager
async def exporting(
    settings: ServerSettings, service: str, *, trusts_callers: bool = True
) -> AsyncIterator[None]:
    """Exports the process's spans, in the name of `service`, for the duration of the block.

    `trusts_callers`: callers decide which of their calls are traced, beyond the setting's ratio.
    """
    if settings.otlp_endpoint is None:
        yield
        return
    from serving.telemetry.otlp import tracer_provider  # noqa: PLC0415  # imports the SDK

    provider = tracer_provider(
        settings.otlp_endpoint, settings.trace_ratio, service, trusts_callers=trusts_callers
    )
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        await asyncio.to_thread(provider.shutdown)  # sends the remaining spans


def call(
    method: str, metadata: Iterable[tuple[str, str | bytes]], system: str = "grpc"
) -> AbstractContextManager[object]:
    """The span of a call that this server answers; spans started within it are its children."""
    # The API alone would hand the caller's context on to the services behind this one.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return contextlib.nullcontext()
    parent = (value for key, value in metadata if key == TRACEPARENT and isinstance(value, str))
    service, _, name = method.removeprefix("/").rpartition("/")
    attributes = {"rpc.system": system, "rpc.service": service, "rpc.method": name}
    if call_id := request_id.current():
        attributes["chasqui.request_id"] = call_id
    # An exception's text may hold what a user wrote; the status says enough.
    return _tracer.start_as_current_span(
        f"{service}/{name}",
        context=_context(next(parent, "")),
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    )


def end_call(code: grpc.StatusCode) -> None:
    """Adds the status that the call ended with to its span."""
    span = trace.get_current_span()
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in _SERVER_ERRORS:
        span.set_status(Status(StatusCode.ERROR, code.name))


def annotate(attributes: Mapping[str, str | int | list[str]]) -> None:
    """Adds attributes to the current call's span, unless it has ended."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes(attributes)


def traceparent() -> str:
    """The current span's name for another service; empty if nothing is traced."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def metadata() -> tuple[tuple[str, str], ...]:
    """The same, as metadata of a call to another service."""
    parent = traceparent()
    return ((TRACEPARENT, parent),) if parent else ()


def start(name: str, parent: str, attributes: Mapping[str, str | int]) -> Span:
    """A child of `parent`, a traceparent; records nothing without one, or if tracing is off."""
    if not parent:
        return trace.INVALID_SPAN
    context = _context(parent)
    return _tracer.start_span(name, context=context, kind=SpanKind.SERVER, attributes=attributes)


def _context(parent: str) -> Context:
    """The context of a traceparent; that of a new trace if it is empty or malformed."""
    return _propagator.extract({TRACEPARENT: parent}, Context())
