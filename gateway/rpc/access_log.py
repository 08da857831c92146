"""The account of each completion request, for the metrics, the access log and the trace.

A request ends when its answers end. For a named stream that can be long after its first call.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

from gateway.generation.events import AnswerKey, Delta, Finished, Started
from gateway.request.options import ModelRequest, TextRequest
from gateway.rpc.metrics import RequestMetrics
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import FinishReason
from serving.errors import RequestError
from serving.security import caller
from serving.telemetry import tracing
from serving.telemetry.gen_ai import Operation
from serving.telemetry.metrics import go_name

_log = structlog.stdlib.get_logger("access")

# OpenTelemetry's names of operations, and ours where it has none.
_OPERATIONS = {"ChatComplete": "chat", "ChatCompleteStream": "chat", "Score": "score"}


class Context(Protocol):
    """The call of a request: gRPC's context, or an HTTP request."""

    def peer(self) -> str:
        """The client's address, as gRPC writes it: ipv4:127.0.0.1:40000."""

    def time_remaining(self) -> float | None:
        """Seconds until its deadline; None if it has none."""


@dataclass(slots=True)
class _Answer:
    """The counters of one answer, so far."""

    prompt_tokens: int
    begins_with_echo: bool
    completion_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float | None = None
    ended_at: float = 0.0
    finished: Finished | None = None


@dataclass(slots=True)
class Account:
    """One request's answers."""

    arrived: float  # time.monotonic
    echo: bool  # the first delta of each answer is its prompt
    metrics: RequestMetrics
    response_id: str = ""
    answers: dict[AnswerKey, _Answer] = field(default_factory=dict)

    def observe(self, key: AnswerKey, event: Started | Delta | Finished) -> None:
        """Counts an event of an answer. Runs with every token, so it must stay cheap."""
        if isinstance(event, Delta):
            answer = self.answers[key]
            answer.completion_tokens = event.completion_tokens
            if answer.begins_with_echo:
                answer.begins_with_echo = False
            elif answer.prompt_tokens:  # else it is a refusal, not the model's output
                now = time.monotonic()
                if answer.last_token_at is None:
                    self.metrics.first_token.observe(now - self.arrived)
                    answer.first_token_at = now
                else:
                    self.metrics.inter_token.observe(now - answer.last_token_at)
                answer.last_token_at = now
        elif isinstance(event, Started):
            self.response_id = event.response_id
            self.answers[key] = _Answer(event.usage.prompt_tokens, self.echo)
        else:
            answer = self.answers[key]
            answer.completion_tokens = event.usage.completion_tokens
            answer.finished, answer.ended_at = event, time.monotonic()


@dataclass(frozen=True, slots=True)
class _Asked:
    """The part of a request that its account needs."""

    method: str
    model: str
    is_named: bool
    begins_with_echo: bool

    @classmethod
    def of(cls, request: ModelRequest) -> "_Asked":
        # With logprobs, the prompt's tokens come together with the first one of the answer, and a
        # score has no other ones.
        echo = isinstance(request, chat_pb2.ScoreRequest)
        if isinstance(request, TextRequest):
            echo = request.echo and not request.logprobs
        method = request.DESCRIPTOR.name.removesuffix("Request")
        is_named = bool(getattr(request, "stream_name", ""))
        return cls(method, request.model, is_named, echo)


class Accounting:
    """Keeps the accounts of a gateway's requests."""

    def __init__(self, metrics: RequestMetrics, *, log_client_addresses: bool) -> None:
        self._metrics = metrics
        self._log_client_addresses = log_client_addresses

    @contextmanager
    def account(self, request: ModelRequest, context: Context) -> Iterator[Account]:
        """The account of a request; the end of the `with` block closes it in any case."""
        asked = _Asked.of(request)
        del request  # can have megabytes, which must not be held until the answers end
        account = Account(time.monotonic(), asked.begins_with_echo, self._metrics)
        client_address = context.peer() if self._log_client_addresses else None
        code = grpc.StatusCode.INTERNAL
        try:
            yield account
            code = grpc.StatusCode.OK
        except RequestError as error:
            code = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            # A named stream that has begun has no deadline.
            lasts = asked.is_named and account.answers
            expired = not lasts and context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        finally:
            self._close(account, code, asked, client_address)

    def _close(
        self, account: Account, code: grpc.StatusCode, asked: _Asked, client_address: str | None
    ) -> None:
        total = time.monotonic() - account.arrived
        cost = _cost(account)
        key = caller.current().name
        self._count(account, cost, key, code, total)
        name = _OPERATIONS.get(asked.method, "text_completion")
        operation = Operation(name, self._metrics.model_label(asked.model))
        self._count_operation(operation, account, code, total)
        if account.answers:
            tokens = cost.prompt_tokens, cost.completion_tokens
            self._metrics.gen_ai.observe_usage(operation, *tokens)
        reasons = [*cost.finish_reasons.elements()]
        tracing.annotate(
            {
                "gen_ai.operation.name": operation.name,
                "gen_ai.usage.input_tokens": cost.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": cost.cached_prompt_tokens,
                "gen_ai.usage.output_tokens": cost.completion_tokens,
                "gen_ai.response.finish_reasons": reasons,
            }
        )
        optional = {
            "key": key,
            "client_address": client_address,
            "response_id": account.response_id,
            "failovers": cost.failovers,
        }
        _log.info(
            "request finished",
            method=asked.method,
            code=code.name,
            **{name: value for name, value in optional.items() if value},
            answers=len(account.answers),
            finish_reasons=dict(cost.finish_reasons),
            prompt_tokens=cost.prompt_tokens,
            cached_prompt_tokens=cost.cached_prompt_tokens,
            completion_tokens=cost.completion_tokens,
            **{name: round(seconds, 6) for name, seconds in cost.seconds.items()},
            total_time=round(total, 6),
        )

    def _count(
        self, account: Account, cost: "_Cost", key: str, code: grpc.StatusCode, total: float
    ) -> None:
        metrics = self._metrics
        metrics.seconds.labels(go_name(code)).observe(total)
        metrics.prompt_tokens.labels(key).inc(cost.prompt_tokens)
        metrics.cached_prompt_tokens.labels(key).inc(cost.cached_prompt_tokens)
        metrics.completion_tokens.labels(key).inc(cost.completion_tokens)
        for reason, count in cost.finish_reasons.items():
            metrics.finished.labels(reason).inc(count)
        if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
            for answer in account.answers.values():
                if answer.finished is None:
                    metrics.cancelled_tokens.observe(answer.completion_tokens)

    def _count_operation(
        self, operation: Operation, account: Account, code: grpc.StatusCode, total: float
    ) -> None:
        """Counts the times of a request under OpenTelemetry's names, too."""
        succeeded, metrics = code is grpc.StatusCode.OK, self._metrics.gen_ai
        metrics.observe_request(operation, total, "" if succeeded else code.name)
        for answer in account.answers.values() if succeeded else ():
            if first := answer.first_token_at:
                waited, others = first - account.arrived, answer.ended_at - first
                metrics.observe_answer(operation, waited, others, answer.completion_tokens)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Sums over all answers of a request; of the times other than compute_time, the longest."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    finish_reasons: Counter[str]
    seconds: dict[str, float]
    failovers: int


def _cost(account: Account) -> _Cost:
    answers = account.answers.values()
    finished = [answer.finished for answer in answers if answer.finished is not None]
    seconds: dict[str, float] = defaultdict(float)
    for usage in (each.usage for each in finished):
        for name in ("queue_time", "prefill_time", "decode_time"):
            seconds[name] = max(seconds[name], _seconds(usage, name))
        seconds["compute_time"] += _seconds(usage, "compute_time")
    return _Cost(
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        cached_prompt_tokens=sum(each.usage.cached_prompt_tokens for each in finished),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        finish_reasons=Counter(_name(each.reason) for each in finished),
        seconds=dict(seconds),
        failovers=sum(each.failovers for each in finished),
    )


def _seconds(usage: chat_pb2.Usage, name: str) -> float:
    nanoseconds: int = getattr(usage, name).ToNanoseconds()
    return nanoseconds / 1e9


def _name(reason: "FinishReason.ValueType") -> str:
    return FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
