"""Spans through OpenTelemetry's SDK to an OTLP collector, by gRPC. Only `serving.telemetry.tracing`
imports this, and only where it is on, as the SDK takes its time to load. A thread sends spans in
batches: a collector that is away costs spans, never a call.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_NAMESPACE, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import (
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util import types

from serving.telemetry import request_id
from serving.telemetry.tracing import TRACEPARENT, Attributes

__all__ = ["Span", "Tracer"]

EXPORT_TIMEOUT = 5.0  # seconds

# The statuses that OpenTelemetry's conventions call a server's error; others are the client's.
_SERVER_ERRORS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class _UnpredictableRatio(Sampler):
    """Samples a part of the calls, whatever their trace ids are: TraceIdRatioBased decides by the
    id, so a caller that chooses the id would choose the decision.
    """

    def __init__(self, ratio: float) -> None:
        self._by_id = TraceIdRatioBased(ratio)

    def should_sample(  # noqa: PLR0917  # OpenTelemetry's signature
        self,
        parent_context: Context | None,
        trace_id: int,  # noqa: ARG002  # the caller's choice
        name: str,
        kind: SpanKind | None = None,
        attributes: types.Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        drawn = random.getrandbits(128)
        return self._by_id.should_sample(
            parent_context, drawn, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return f"UnpredictableRatio{{{self._by_id.rate}}}"


def sampler(ratio: float, *, trusts_callers: bool) -> Sampler:
    """Samples `ratio` of the traces that begin here. One that its caller samples is sampled, too,
    but only `ratio` of those unless `trusts_callers`; one that its caller does not, is not.
    """
    root = TraceIdRatioBased(ratio)
    if trusts_callers:
        return ParentBased(root)
    return ParentBased(root, remote_parent_sampled=_UnpredictableRatio(ratio))


class Tracer:
    """Makes the spans of one process."""

    def __init__(self, endpoint: str, ratio: float, service: str, *, trusts_callers: bool) -> None:
        resource = Resource.create({SERVICE_NAMESPACE: "chasqui", SERVICE_NAME: service})
        self._provider = TracerProvider(
            sampler=sampler(ratio, trusts_callers=trusts_callers), resource=resource
        )
        exporter = OTLPSpanExporter(
            endpoint, insecure=endpoint.startswith("http:"), timeout=EXPORT_TIMEOUT
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("chasqui")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Sends what is left; waits for it."""
        self._provider.shutdown()

    @contextlib.contextmanager
    def call(self, method: str, parent: str) -> Iterator[None]:
        service, _, name = method.removeprefix("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        if call_id := request_id.current():
            attributes["chasqui.request_id"] = call_id
        # What an exception says may be what a user wrote; the status tells enough.
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            context=self._context(parent),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ):
            yield

    def end_call(self, code: grpc.StatusCode) -> None:
        span = trace.get_current_span()
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code in _SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR, code.name))

    def annotate(self, attributes: Attributes) -> None:
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(dict(attributes))

    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get(TRACEPARENT, "")

    def start(self, name: str, parent: str, attributes: Attributes) -> Span:
        return self._tracer.start_span(
            name,
            context=self._context(parent),
            kind=SpanKind.SERVER,
            attributes=dict(attributes),
        )

    def _context(self, parent: str) -> Context:
        """Of a traceparent; a new trace where it is empty or malformed."""
        return self._propagator.extract({TRACEPARENT: parent}, Context())
