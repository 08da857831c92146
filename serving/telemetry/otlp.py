"""OpenTelemetry's SDK, set up to send spans to an OTLP collector by gRPC.

`serving.telemetry.tracing` imports this only if tracing is on, because the SDK is slow to import.
A thread sends spans in batches: while the collector is away, spans are lost and calls are not.
"""

import random
from collections.abc import Sequence

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
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util import types

EXPORT_TIMEOUT = 5.0  # seconds


class _UnpredictableRatio(Sampler):
    """Samples a part of the calls at random. TraceIdRatioBased decides by the trace id, so a caller
    that chooses the id would choose the decision.
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
    """Samples `ratio` of the traces that begin here. A trace that the caller began is sampled only
    if the caller samples it, and then always if `trusts_callers`, else `ratio` of them.
    """
    root = TraceIdRatioBased(ratio)
    if trusts_callers:
        return ParentBased(root)
    return ParentBased(root, remote_parent_sampled=_UnpredictableRatio(ratio))


def tracer_provider(
    endpoint: str, ratio: float, service: str, *, trusts_callers: bool
) -> TracerProvider:
    """Makes and exports the spans of one process, in the name of `service`."""
    provider = TracerProvider(
        sampler=sampler(ratio, trusts_callers=trusts_callers),
        resource=Resource.create({SERVICE_NAMESPACE: "chasqui", SERVICE_NAME: service}),
    )
    exporter = OTLPSpanExporter(
        endpoint, insecure=endpoint.startswith("http:"), timeout=EXPORT_TIMEOUT
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
