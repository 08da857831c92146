"""The metrics of a server: its calls, its health, its process, and those of its service.

Prometheus reads them over HTTP on a separate port. Calls have the metric names of
go-grpc-prometheus, so that existing dashboards fit; our own names begin with `chasqui_`. Scrapes
run in separate threads, so a collector must read only immutable objects or single values.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import grpc
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.registry import Collector

from serving.errors import RequestError, StartError
from serving.settings import ServerSettings
from serving.standard_services.health import Health
from serving.telemetry.metrics_port import MetricsServer, serve_metrics

_log = structlog.stdlib.get_logger(__name__)

DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_GO_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


class CallMetrics:
    """Counts the calls of one server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter(
            "grpc_server_started_total", "Calls started.", _METHOD, registry=registry
        )
        self._handled = Counter(
            "grpc_server_handled_total",
            "Calls ended, by status.",
            (*_METHOD, "grpc_code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from the start of a call to its end.",
            _METHOD,
            buckets=DURATIONS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "chasqui_calls_in_flight", "Calls that are running.", _METHOD, registry=registry
        )
        self._refusals = Counter(
            "chasqui_refusals_total",
            "Calls refused, by status and reason: the exhausted limit, or else the status again.",
            (*_METHOD, "grpc_code", "reason"),
            registry=registry,
        )
        self._methods: dict[tuple[str, str], MethodMetrics] = {}

    def method(self, path: str, kind: str) -> "MethodMetrics":
        """The metrics of the method at `path`, for example /llama.v1.ChatService/GetModel.

        `kind` is go-grpc-prometheus's grpc_type, for example server_stream, or "http" for requests
        that do the same over HTTP.
        """
        known = self._methods.get((path, kind))
        if known is None:
            _, service, method = path.split("/")
            labels = (kind, service, method)
            known = self._methods[path, kind] = MethodMetrics(
                labels,
                started=self._started.labels(*labels),
                in_flight=self._in_flight.labels(*labels),
                seconds=self._seconds.labels(*labels),
                handled=self._handled,
                refusals=self._refusals,
            )
        return known


@dataclass(slots=True)
class MethodMetrics:
    """Counts the calls of one method, whose `labels` are kind, service and method."""

    labels: tuple[str, str, str]
    started: Counter
    in_flight: Gauge
    seconds: Histogram
    handled: Counter
    refusals: Counter
    _ended: dict[grpc.StatusCode, Counter] = field(default_factory=dict, init=False)

    def begin(self) -> None:
        self.started.inc()
        self.in_flight.inc()

    def refuse(self, error: RequestError) -> None:
        """Counts the reason; `end` still follows."""
        reason = error.quota or error.code.name.lower()
        self.refusals.labels(*self.labels, go_name(error.code), reason).inc()

    def end(self, code: grpc.StatusCode, seconds: float) -> None:
        self.in_flight.dec()
        self.seconds.observe(seconds)
        ended = self._ended.get(code)
        if ended is None:
            ended = self._ended[code] = self.handled.labels(*self.labels, go_name(code))
        ended.inc()


def go_name(code: grpc.StatusCode) -> str:
    """The status as go-grpc-prometheus writes it: OK, Canceled, InvalidArgument."""
    return _GO_NAMES[code]


def registry_of(health: Health, collectors: Iterable[Collector]) -> CollectorRegistry:
    """The registry of one server; not the process's, because tests run several servers in one."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    serving = Gauge("chasqui_serving", "1 while the health is SERVING, else 0.", registry=registry)
    serving.set_function(lambda: health.serving)
    for collector in collectors:
        registry.register(collector)
    return registry


@contextlib.contextmanager
def exposed(settings: ServerSettings, registry: CollectorRegistry) -> Iterator[None]:
    """Serves the registry over HTTP for the duration of the block, if the settings name a port."""
    if settings.metrics_port is None:
        yield
        return
    host = f"[{settings.metrics_host}]" if ":" in settings.metrics_host else settings.metrics_host
    try:
        server = serve_metrics(settings.metrics_host, settings.metrics_port, registry)
    except OSError as error:
        raise StartError(
            f"cannot serve metrics on {host}:{settings.metrics_port}: {error.strerror}; choose "
            "another address with --metrics_host or another port with --metrics_port"
        ) from error
    _log.info("serving metrics", address=f"{host}:{server.server_port}")
    try:
        yield
    finally:
        # In a thread, because it takes up to half a second.
        threading.Thread(target=_close, args=(server,), daemon=True).start()


def _close(server: MetricsServer) -> None:
    server.shutdown()
    server.server_close()
