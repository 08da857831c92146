"""The gateway's metrics beyond those of its calls: requests, queues, upstreams and replicas."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from gateway.admission.admission import Admission
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.upstreams import Backend
from llama.v1.operator_pb2 import UPSTREAM_STATE_UNSPECIFIED, UpstreamState
from serving.errors import RequestError
from serving.telemetry.gen_ai import OTHER_MODEL, GenAiMetrics

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INTER_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10),
)
REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CANCELLED_TOKENS = (0, 1, 4, 16, 64, 256, 1024, 4096)

_STATES = {
    state: name.removeprefix("UPSTREAM_STATE_").lower()
    for name, state in UpstreamState.items()
    if state != UPSTREAM_STATE_UNSPECIFIED
}


class RequestMetrics:
    """Times and tokens of requests. The label `key` is a configured name, so it has few values."""

    def __init__(self, served_model: Callable[[], str]) -> None:
        """`served_model` returns its name, and raises RequestError while it is not known."""
        self._served_model = served_model
        self.gen_ai = GenAiMetrics()
        self.inter_token = Histogram(  # the only one observed with every token: 1 µs
            "chasqui_gateway_inter_token_seconds",
            "Time between consecutive tokens of an answer; those of one step count as one.",
            buckets=INTER_TOKEN_SECONDS,
            registry=None,
        )
        self.first_token = Histogram(
            "chasqui_gateway_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of each of its answers.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=None,
        )
        self.seconds = Histogram(
            "chasqui_gateway_request_seconds",
            "Time from a request's arrival to the end of its last answer, by status.",
            ["grpc_code"],
            buckets=REQUEST_SECONDS,
            registry=None,
        )
        self.prompt_tokens = Counter(
            "chasqui_gateway_prompt_tokens_total",
            "Prompt tokens of answers, by the name of the caller's key.",
            ["key"],
            registry=None,
        )
        self.cached_prompt_tokens = Counter(
            "chasqui_gateway_cached_prompt_tokens_total",
            "Prompt tokens found in a replica's prefix cache, by the name of the caller's key.",
            ["key"],
            registry=None,
        )
        self.completion_tokens = Counter(
            "chasqui_gateway_completion_tokens_total",
            "Answer tokens, those of cancelled answers included, by the name of the caller's key.",
            ["key"],
            registry=None,
        )
        self.finished = Counter(
            "chasqui_gateway_finished_total",
            "Answers that were completed, by finish reason.",
            ["finish_reason"],
            registry=None,
        )
        self.cancelled_tokens = Histogram(
            "chasqui_gateway_cancelled_after_tokens",
            "Tokens that answers had when their request was cancelled or its deadline passed.",
            buckets=CANCELLED_TOKENS,
            registry=None,
        )

    def model_label(self, asked: str) -> str:
        """The name of the model that a request asks for, one of few values."""
        try:
            served = self._served_model()
        except RequestError:
            return OTHER_MODEL if asked else ""
        return served if asked in ("", served) else OTHER_MODEL

    def collect(self) -> Iterator[Metric]:
        yield from self.gen_ai.collect()
        for metric in (
            self.inter_token,
            self.first_token,
            self.seconds,
            self.prompt_tokens,
            self.cached_prompt_tokens,
            self.completion_tokens,
            self.finished,
            self.cancelled_tokens,
        ):
            yield from metric.collect()


class StateMetrics:
    """The current state of the gateway, read at each scrape, in Prometheus' own thread."""

    def __init__(self, backend: Backend, admission: Admission, streams: NamedStreams) -> None:
        self._backend = backend
        self._admission = admission
        self._streams = streams

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "chasqui_gateway_running_sequences", "Generations that were given to a replica."
        )
        running.add_metric((), self._admission.running_sequences)
        queued = GaugeMetricFamily(
            "chasqui_gateway_queued_sequences", "Generations that wait in the gateway's queue."
        )
        queued.add_metric((), self._admission.queued_sequences)
        tokens = GaugeMetricFamily(
            "chasqui_gateway_queued_tokens",
            "Estimated tokens of the queued generations, by the name of the caller's key.",
            labels=["key"],
        )
        for key, count in self._admission.queued_tokens.items():
            tokens.add_metric([key], count)
        displaced = CounterMetricFamily(
            "chasqui_gateway_displaced_sequences",
            "Waiting generations that another key's displaced from the full queue, by the name of "
            "the displaced key.",
            labels=["key"],
        )
        for key, count in [*self._admission.displaced_sequences.items()]:
            displaced.add_metric([key], count)
        tokenizer = GaugeMetricFamily(
            "chasqui_gateway_tokenizer_ready", "1 while the tokenizer service can be used, else 0."
        )
        tokenizer.add_metric((), self._backend.tokenizer.ready)
        detached = GaugeMetricFamily(
            "chasqui_gateway_detached_streams", "Named streams that run while no call reads them."
        )
        detached.add_metric((), self._streams.detached)
        failovers = CounterMetricFamily(
            "chasqui_gateway_failovers",
            "How often sequences continued at another replica, because theirs was lost.",
        )
        failovers.add_metric((), self._backend.replicas.failovers)
        own = (running, queued, tokens, displaced, tokenizer, detached, failovers)
        return [*own, *self._safety(), *self._replicas()]

    def _safety(self) -> Iterable[Metric]:
        classifier = self._backend.classifier
        ready = GaugeMetricFamily(
            "chasqui_gateway_safety_ready",
            "1 while the safety service can be used, else 0; absent if none is configured.",
        )
        unjudged = CounterMetricFamily(
            "chasqui_gateway_unjudged",
            "Dialogs, texts and chunks of answers that passed unjudged, without a safety service.",
        )
        if classifier is not None:
            ready.add_metric((), classifier.upstream.serving)
        unjudged.add_metric((), 0 if classifier is None else classifier.unjudged)
        return ready, unjudged

    def _replicas(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily(
            "chasqui_gateway_replica_ready",
            "1 while the replica takes work, else 0.",
            labels=["replica"],
        )
        states = GaugeMetricFamily(
            "chasqui_gateway_replica_state",
            "1 for the current state of the replica, 0 for the others.",
            labels=["replica", "state"],
        )
        outstanding = GaugeMetricFamily(
            "chasqui_gateway_replica_outstanding_tokens",
            "Prompt and answer tokens that the replica may still have to compute for this gateway.",
            labels=["replica"],
        )
        for replica in self._backend.replicas.replicas:
            ready.add_metric([replica.target], replica.ready)
            current = replica.upstream.state
            for state, name in _STATES.items():
                states.add_metric([replica.target, name], state == current)
            outstanding.add_metric([replica.target], replica.outstanding_tokens)
        return ready, states, outstanding
