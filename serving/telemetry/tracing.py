"""Traces of requests over all services, for an OTLP collector; off unless the settings name one.
OpenTelemetry is imported only then. Spans hold ids, sizes and times, never what users wrote.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from serving.settings import ServerSettings

if TYPE_CHECKING:
    from serving.telemetry.otlp import Span, Tracer

TRACEPARENT = "traceparent"  # the W3C's name for the trace and span that a call belongs to

Attributes = Mapping[str, str | int | float | list[str]]


@dataclass(slots=True)
class _Process:
    tracer: "Tracer | None" = None


_process = _Process()


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
    from serving.telemetry.otlp import Tracer  # noqa: PLC0415  # costs nothing where it is off

    tracer = Tracer(
        settings.otlp_endpoint, settings.trace_ratio, service, trusts_callers=trusts_callers
    )
    _process.tracer = tracer
    try:
        yield
    finally:
        _process.tracer = None
        await asyncio.to_thread(tracer.close)


def call(
    method: str, metadata: Iterable[tuple[str, str | bytes]]
) -> AbstractContextManager[object]:
    """The span of a call that this server answers; within it, what else is traced belongs to it."""
    if _process.tracer is None:
        return contextlib.nullcontext()
    parent = (value for key, value in metadata if key == TRACEPARENT and isinstance(value, str))
    return _process.tracer.call(method, next(parent, ""))


def end_call(code: grpc.StatusCode) -> None:
    """Notes in the current call's span how it ended."""
    if _process.tracer is not None:
        _process.tracer.end_call(code)


def annotate(attributes: Attributes) -> None:
    """Adds to the current call's span, if it still runs."""
    if _process.tracer is not None:
        _process.tracer.annotate(attributes)


def traceparent() -> str:
    """What names the current call's span to another service; empty where nothing is traced."""
    return "" if _process.tracer is None else _process.tracer.traceparent()


def metadata() -> tuple[tuple[str, str], ...]:
    """The same, as metadata of a call to another service."""
    parent = traceparent()
    return ((TRACEPARENT, parent),) if parent else ()


def start(name: str, parent: str, attributes: Attributes) -> "Span | None":
    """A span of its own below `parent`, a traceparent; None where nothing is traced."""
    if _process.tracer is None or not parent:
        return None
    return _process.tracer.start(name, parent, attributes)
