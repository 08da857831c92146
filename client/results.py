"""Answers of the gateway as frozen dataclasses, and their conversion from the contract's messages.

Names are the contract's; `protos/llama/v1/chat.proto` documents each field. Finish reasons that
this client does not know become FinishReason.UNSPECIFIED.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TypedDict, cast

from google.protobuf.timestamp_pb2 import Timestamp

from client.requests import Message, Sampling
from llama.prompt_format.tags import SPECIAL_TAGS, without_special_tags
from llama.v1 import chat_pb2, sampling_pb2


class FinishReason(Enum):
    """Why a generation ended."""

    UNSPECIFIED = sampling_pb2.FINISH_REASON_UNSPECIFIED
    STOP = sampling_pb2.FINISH_REASON_STOP
    STOP_STRING = sampling_pb2.FINISH_REASON_STOP_STRING
    LENGTH = sampling_pb2.FINISH_REASON_LENGTH
    CONTEXT_LENGTH = sampling_pb2.FINISH_REASON_CONTEXT_LENGTH
    SPECIAL_TAGS = sampling_pb2.FINISH_REASON_SPECIAL_TAGS
    SAFETY = sampling_pb2.FINISH_REASON_SAFETY
    CANCELLED = sampling_pb2.FINISH_REASON_CANCELLED


_FINISH_REASONS: Mapping[int, FinishReason] = {reason.value: reason for reason in FinishReason}


class Determinism(Enum):
    """The conditions of an exact replay."""

    UNSPECIFIED = sampling_pb2.DETERMINISM_UNSPECIFIED
    SEEDED = sampling_pb2.DETERMINISM_SEEDED
    BATCH_INVARIANT = sampling_pb2.DETERMINISM_BATCH_INVARIANT


_DETERMINISMS: Mapping[int, Determinism] = {each.value: each for each in Determinism}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The logprob of a candidate token at a position."""

    id: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; `bytes` is exact even if the token is only part of a character."""

    id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int
    top_logprobs: tuple[TokenLogprob, ...]
    requested_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens and the time that a prediction took."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queue_time: timedelta
    prefill_time: timedelta
    decode_time: timedelta
    total_time: timedelta
    compute_time: timedelta


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer to a dialog, or one continuation of a prompt; with `echo`, the prompt included."""

    index: int
    choice_index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stop_token_id: int | None
    stop_string: str | None
    safety_categories: tuple[str, ...]
    usage: Usage
    sampling: Sampling
    dropped_turns: int
    fingerprint: str
    determinism: Determinism
    failovers: int
    # Fields of the response, equal for all of its predictions:
    id: str
    created: datetime
    model: str
    special_tags: tuple[str, ...] = SPECIAL_TAGS

    @property
    def seed(self) -> int:
        """The seed that the tokens were drawn with."""
        return self.sampling.get("seed") or 0

    @property
    def message(self) -> Message:
        """The answer as a message, to append to the dialog.

        Special tags in `text` are removed, because a dialog that contains one is refused.
        """
        return {"role": "assistant", "content": without_special_tags(self.text, self.special_tags)}


@dataclass(frozen=True, slots=True)
class Started:
    """Stream event: answer `choice_index` to dialog or prompt number `index` starts."""

    index: int
    choice_index: int
    id: str
    created: datetime
    model: str
    prompt_tokens: int
    sampling: Sampling
    dropped_turns: int
    fingerprint: str
    determinism: Determinism
    special_tags: tuple[str, ...] = SPECIAL_TAGS

    @property
    def seed(self) -> int:
        """The seed that the tokens are drawn with."""
        return self.sampling.get("seed") or 0


@dataclass(frozen=True, slots=True)
class Delta:
    """Stream event: more text of an answer."""

    index: int
    choice_index: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Stream event: an answer is complete."""

    index: int
    choice_index: int
    finish_reason: FinishReason
    stop_token_id: int | None
    stop_string: str | None
    safety_categories: tuple[str, ...]
    usage: Usage
    failovers: int


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The prompt that the model would get for a dialog."""

    ids: tuple[int, ...]
    segments: tuple[str, ...]
    prompt_tokens: int
    remaining_tokens: int
    dropped_turns: int
    has_special_tags: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request."""

    max_dialogs: int
    max_messages: int
    max_choices: int
    max_top_logprobs: int
    max_logprob_token_ids: int
    max_sequences: int
    max_request_bytes: int
    max_response_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """The served model."""

    name: str
    context_length: int
    vocab_size: int
    parameters: int
    shards: int
    replicas: int
    dtype: str
    quantization: str
    fingerprint: str
    determinism: Determinism
    limits: Limits
    sampling_defaults: Sampling
    prompt_format: str = ""
    special_tags: tuple[str, ...] = SPECIAL_TAGS


def determinism(value: int) -> Determinism:
    """The enum member of a value; UNSPECIFIED if this client does not know it."""
    return _DETERMINISMS.get(value, Determinism.UNSPECIFIED)


def predictions(
    response: chat_pb2.ChatCompleteResponse | chat_pb2.TextCompleteResponse,
) -> list[Prediction]:
    return [_prediction(each, response) for each in response.predictions]


def _prediction(
    message: chat_pb2.Prediction,
    response: chat_pb2.ChatCompleteResponse | chat_pb2.TextCompleteResponse,
) -> Prediction:
    return Prediction(
        index=message.index,
        choice_index=message.choice_index,
        text=message.text,
        tokens=tokens_of(message.tokens),
        finish_reason=_finish_reason(message.finish_reason),
        **_stopped_by(message),
        safety_categories=tuple(message.safety_categories),
        usage=usage_of(message.usage),
        sampling=_sampling(message.sampling),
        dropped_turns=message.dropped_turns,
        fingerprint=message.fingerprint,
        determinism=determinism(message.determinism),
        failovers=message.failovers,
        id=response.id,
        created=datetime_of(response.created),
        model=response.model,
        special_tags=_special_tags(message),
    )


def event(message: chat_pb2.StreamEvent) -> Event:
    if message.HasField("started"):
        started = message.started
        return Started(
            index=started.index,
            choice_index=started.choice_index,
            id=started.id,
            created=datetime_of(started.created),
            model=started.model,
            prompt_tokens=started.prompt_tokens,
            sampling=_sampling(started.sampling),
            dropped_turns=started.dropped_turns,
            fingerprint=started.fingerprint,
            determinism=determinism(started.determinism),
            special_tags=_special_tags(started),
        )
    if message.HasField("delta"):
        delta = message.delta
        return Delta(delta.index, delta.choice_index, delta.text, tokens_of(delta.tokens))
    finished = message.finished
    return Finished(
        index=finished.index,
        choice_index=finished.choice_index,
        finish_reason=_finish_reason(finished.finish_reason),
        **_stopped_by(finished),
        safety_categories=tuple(finished.safety_categories),
        usage=usage_of(finished.usage),
        failovers=finished.failovers,
    )


def rendered_prompt(response: chat_pb2.RenderPromptResponse) -> RenderedPrompt:
    return RenderedPrompt(
        ids=tuple(response.ids),
        segments=tuple(response.segments),
        prompt_tokens=response.prompt_tokens,
        remaining_tokens=response.remaining_tokens,
        dropped_turns=response.dropped_turns,
        has_special_tags=response.has_special_tags,
    )


def model(response: chat_pb2.GetModelResponse) -> Model:
    limits = response.limits
    return Model(
        name=response.name,
        context_length=response.context_length,
        vocab_size=response.vocab_size,
        parameters=response.parameters,
        shards=response.shards,
        replicas=response.replicas,
        dtype=response.dtype,
        quantization=response.quantization,
        fingerprint=response.fingerprint,
        determinism=determinism(response.determinism),
        limits=Limits(
            max_dialogs=limits.max_dialogs,
            max_messages=limits.max_messages,
            max_choices=limits.max_choices,
            max_top_logprobs=limits.max_top_logprobs,
            max_logprob_token_ids=limits.max_logprob_token_ids,
            max_sequences=limits.max_sequences,
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
        ),
        sampling_defaults=_sampling(response.sampling_defaults),
        prompt_format=response.prompt_format.name,
        special_tags=_special_tags(response),
    )


def _special_tags(
    message: chat_pb2.Prediction | chat_pb2.Started | chat_pb2.GetModelResponse,
) -> tuple[str, ...]:
    """Those of the model's prompt format; a gateway that does not tell it knows Llama 2's alone."""
    if not message.HasField("prompt_format"):
        return SPECIAL_TAGS
    return tuple(message.prompt_format.special_tags)


def _finish_reason(value: int) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def tokens_of(tokens: Sequence[chat_pb2.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=token.id,
            text=token.text,
            bytes=token.bytes,
            logprob=token.logprob,
            rank=token.rank,
            top_logprobs=_token_logprobs(token.top_logprobs),
            requested_logprobs=_token_logprobs(token.requested_logprobs),
        )
        for token in tokens
    )


def _token_logprobs(entries: Sequence[chat_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(each.id, each.text, each.bytes, each.logprob) for each in entries)


class _StoppedBy(TypedDict):
    stop_token_id: int | None
    stop_string: str | None


def _stopped_by(message: chat_pb2.Prediction | chat_pb2.Finished) -> _StoppedBy:
    return {
        "stop_token_id": message.stop_token_id if message.HasField("stop_token_id") else None,
        "stop_string": message.stop_string if message.HasField("stop_string") else None,
    }


def datetime_of(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def usage_of(usage: chat_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        queue_time=usage.queue_time.ToTimedelta(),
        prefill_time=usage.prefill_time.ToTimedelta(),
        decode_time=usage.decode_time.ToTimedelta(),
        total_time=usage.total_time.ToTimedelta(),
        compute_time=usage.compute_time.ToTimedelta(),
    )


def _sampling(params: sampling_pb2.SamplingParams) -> Sampling:
    return cast("Sampling", {each.name: _plain(value) for each, value in params.ListFields()})


def _plain(value: object) -> object:
    """A field's value as a caller would write it."""
    match value:
        case float():  # a 32-bit float, shown as 0.6 and not as 0.6000000238418579
            return float(f"{value:.7g}")
        case bool() | int():
            return value
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case _:
            return list(cast("Iterable[object]", value))
