"""Answers of the gateway as frozen dataclasses, and their conversion from the contract's messages.

Names are the contract's; `protos/llama/v1/chat.proto` says what each field means. Reasons that this
client is too old to know read as FinishReason.UNSPECIFIED.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import cast

from client.requests import Message, Sampling
from llama.prompt_format.tags import without_special_tags
from llama.v1 import chat_pb2, sampling_pb2


class FinishReason(Enum):
    """Why a generation ended."""

    UNSPECIFIED = sampling_pb2.FINISH_REASON_UNSPECIFIED
    STOP = sampling_pb2.FINISH_REASON_STOP
    LENGTH = sampling_pb2.FINISH_REASON_LENGTH
    STOP_STRING = sampling_pb2.FINISH_REASON_STOP_STRING
    UNSAFE = sampling_pb2.FINISH_REASON_UNSAFE
    CANCELLED = sampling_pb2.FINISH_REASON_CANCELLED
    SAFETY = sampling_pb2.FINISH_REASON_SAFETY


_FINISH_REASONS: Mapping[int, FinishReason] = {reason.value: reason for reason in FinishReason}


class Determinism(Enum):
    """What a replay may depend on."""

    UNSPECIFIED = sampling_pb2.DETERMINISM_UNSPECIFIED
    SEEDED = sampling_pb2.DETERMINISM_SEEDED
    BATCH_INVARIANT = sampling_pb2.DETERMINISM_BATCH_INVARIANT


_DETERMINISMS: Mapping[int, Determinism] = {each.value: each for each in Determinism}


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a position."""

    id: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; `bytes` is exact where `text` is a part of a character."""

    id: int
    text: str
    bytes: bytes
    logprob: float
    top_logprobs: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a prediction cost."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queued: timedelta
    prefill: timedelta
    decode: timedelta
    total: timedelta
    compute: timedelta


@dataclass(frozen=True, slots=True)
class ChatPrediction:
    """One answer to one dialog."""

    content: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    fingerprint: str
    dropped_turns: int
    choice_index: int
    resumed: int = 0
    safety_categories: tuple[str, ...] = ()
    determinism: Determinism = Determinism.UNSPECIFIED

    @property
    def message(self) -> Message:
        """The answer as a message, to append to the dialog.

        Without the special tags that `content` may hold: a dialog with one is refused.
        """
        return {"role": "assistant", "content": without_special_tags(self.content)}


@dataclass(frozen=True, slots=True)
class TextPrediction:
    """One continuation of one text; with `echo`, prompt included."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    fingerprint: str
    choice_index: int
    resumed: int = 0
    safety_categories: tuple[str, ...] = ()
    determinism: Determinism = Determinism.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Started:
    """Stream event: answer `choice_index` to the dialog or prompt number `index` was begun."""

    index: int
    choice_index: int
    prompt_tokens: int
    seed: int
    fingerprint: str
    dropped_turns: int = 0
    determinism: Determinism = Determinism.UNSPECIFIED


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
    usage: Usage
    resumed: int = 0
    safety_categories: tuple[str, ...] = ()


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What the model would see of a dialog."""

    ids: tuple[int, ...]
    segments: tuple[str, ...]
    prompt_tokens: int
    remaining_tokens: int
    dropped_turns: int
    unsafe: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may hold."""

    max_dialogs: int
    max_messages: int
    max_request_bytes: int
    max_queued_sequences: int
    max_top_logprobs: int
    max_choices: int
    max_response_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """What is served."""

    name: str
    context_length: int
    vocab_size: int
    parameters: int
    shards: int
    replicas: int
    dtype: str
    quantization: str
    fingerprint: str
    limits: Limits
    sampling_defaults: Sampling
    determinism: Determinism = Determinism.UNSPECIFIED


def determinism(value: int) -> Determinism:
    """A value that this client is too old to know is UNSPECIFIED."""
    return _DETERMINISMS.get(value, Determinism.UNSPECIFIED)


def chat_prediction(prediction: chat_pb2.ChatPrediction) -> ChatPrediction:
    return ChatPrediction(
        content=prediction.generation.content,
        tokens=_tokens(prediction.tokens),
        finish_reason=_finish_reason(prediction.finish_reason),
        usage=_usage(prediction.usage),
        seed=prediction.seed,
        fingerprint=prediction.fingerprint,
        determinism=determinism(prediction.determinism),
        dropped_turns=prediction.dropped_turns,
        choice_index=prediction.choice_index,
        resumed=prediction.resumed,
        safety_categories=tuple(prediction.safety_categories),
    )


def text_prediction(prediction: chat_pb2.TextPrediction) -> TextPrediction:
    return TextPrediction(
        text=prediction.generation,
        tokens=_tokens(prediction.tokens),
        finish_reason=_finish_reason(prediction.finish_reason),
        usage=_usage(prediction.usage),
        seed=prediction.seed,
        fingerprint=prediction.fingerprint,
        determinism=determinism(prediction.determinism),
        choice_index=prediction.choice_index,
        resumed=prediction.resumed,
        safety_categories=tuple(prediction.safety_categories),
    )


def chat_event(response: chat_pb2.ChatCompleteStreamResponse) -> Event:
    if response.HasField("started"):
        started = response.started
        return Started(
            index=started.dialog_index,
            choice_index=started.choice_index,
            prompt_tokens=started.usage.prompt_tokens,
            seed=started.seed,
            fingerprint=started.fingerprint,
            determinism=determinism(started.determinism),
            dropped_turns=started.dropped_turns,
        )
    if response.HasField("delta"):
        delta = response.delta
        tokens = _tokens(delta.tokens)
        return Delta(delta.dialog_index, delta.choice_index, delta.text, tokens)
    return _finished(response.finished, response.finished.dialog_index)


def text_event(response: chat_pb2.TextCompleteStreamResponse) -> Event:
    if response.HasField("started"):
        started = response.started
        return Started(
            index=started.prompt_index,
            choice_index=started.choice_index,
            prompt_tokens=started.usage.prompt_tokens,
            seed=started.seed,
            fingerprint=started.fingerprint,
            determinism=determinism(started.determinism),
        )
    if response.HasField("delta"):
        delta = response.delta
        tokens = _tokens(delta.tokens)
        return Delta(delta.prompt_index, delta.choice_index, delta.text, tokens)
    return _finished(response.finished, response.finished.prompt_index)


def rendered_prompt(response: chat_pb2.RenderPromptResponse) -> RenderedPrompt:
    return RenderedPrompt(
        ids=tuple(response.ids),
        segments=tuple(response.segments),
        prompt_tokens=response.prompt_tokens,
        remaining_tokens=response.remaining_tokens,
        dropped_turns=response.dropped_turns,
        unsafe=response.unsafe,
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
            max_request_bytes=limits.max_request_bytes,
            max_queued_sequences=limits.max_queued_sequences,
            max_top_logprobs=limits.max_top_logprobs,
            max_choices=limits.max_choices,
            max_response_bytes=limits.max_response_bytes,
        ),
        sampling_defaults=_sampling(response.sampling_defaults),
    )


def _finished(finished: chat_pb2.ChatFinished | chat_pb2.TextFinished, index: int) -> Finished:
    return Finished(
        index=index,
        choice_index=finished.choice_index,
        finish_reason=_finish_reason(finished.finish_reason),
        usage=_usage(finished.usage),
        resumed=finished.resumed,
        safety_categories=tuple(finished.safety_categories),
    )


def _finish_reason(value: int) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def _tokens(tokens: Sequence[chat_pb2.Token]) -> tuple[Token, ...]:
    return tuple(
        Token(
            id=token.id,
            text=token.text,
            bytes=token.bytes,
            logprob=token.logprob,
            top_logprobs=tuple(
                TopLogprob(top.id, top.text, top.bytes, top.logprob) for top in token.top_logprobs
            ),
        )
        for token in tokens
    )


def _usage(usage: chat_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        queued=usage.queued.ToTimedelta(),
        prefill=usage.prefill.ToTimedelta(),
        decode=usage.decode.ToTimedelta(),
        total=usage.total.ToTimedelta(),
        compute=usage.compute.ToTimedelta(),
    )


def _sampling(params: sampling_pb2.SamplingParams) -> Sampling:
    present: dict[str, object] = {
        # As a float of 32 bits was meant: 0.6, and not 0.6000000238418579.
        field.name: float(f"{value:.7g}") if isinstance(value, float) else value
        for field, value in params.ListFields()
    }
    return cast("Sampling", present)
