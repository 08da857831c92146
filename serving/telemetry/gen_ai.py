"""OpenTelemetry's metrics of generative AI, as Prometheus writes their names.

Source: OpenTelemetry's semantic conventions for generative AI, "Metrics", whose names, attributes
and buckets these are. A dot becomes an underscore, and a unit of time the end of the name, so that
dashboards that are made for these names need no change.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

PROVIDER = "chasqui"
# For the name of a model that is not served. A label for each name that clients ask for would let
# them fill the memory.
OTHER_MODEL = "_OTHER"

_REQUEST_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96)
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5)
_OUTPUT_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = tuple(4**power for power in range(14))
_OPERATION = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


@dataclass(frozen=True, slots=True)
class Operation:
    """The attributes of a request: `name` is chat, text_completion or score."""

    name: str
    model: str

    @property
    def labels(self) -> tuple[str, str, str]:
        return self.name, PROVIDER, self.model


class GenAiMetrics:
    """Times and tokens of requests, observed when a request ends."""

    def __init__(self) -> None:
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from a request's arrival to the end of its last answer.",
            (*_OPERATION, "error_type"),
            buckets=(*_REQUEST_SECONDS, 81.92),
            registry=None,
        )
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of each successful answer.",
            _OPERATION,
            buckets=(*_FIRST_TOKEN_SECONDS, 7.5, 10),
            registry=None,
        )
        self._output_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token behind the first one, the mean of each successful answer.",
            _OPERATION,
            buckets=_OUTPUT_TOKEN_SECONDS,
            registry=None,
        )
        self._usage = Histogram(
            "gen_ai_client_token_usage",
            "Tokens of each request: of its prompts (type input) and of its answers (type output).",
            (*_OPERATION, "gen_ai_token_type"),
            buckets=_TOKENS,
            registry=None,
        )

    def observe_request(self, operation: Operation, seconds: float, error: str) -> None:
        """Counts a request; `error` is its status, empty for a successful one."""
        self._duration.labels(*operation.labels, error).observe(seconds)

    def observe_usage(self, operation: Operation, prompt_tokens: int, answer_tokens: int) -> None:
        self._usage.labels(*operation.labels, "input").observe(prompt_tokens)
        self._usage.labels(*operation.labels, "output").observe(answer_tokens)

    def observe_answer(
        self, operation: Operation, first_token: float, others: float, tokens: int
    ) -> None:
        """Counts a successful answer of so many tokens.

        `first_token`: seconds from the request's arrival to the first token; `others`: from there
        to the end of the answer.
        """
        self._first_token.labels(*operation.labels).observe(first_token)
        if tokens > 1:
            self._output_token.labels(*operation.labels).observe(others / (tokens - 1))

    def collect(self) -> Iterator[Metric]:
        for metric in (self._duration, self._first_token, self._output_token, self._usage):
            yield from metric.collect()
