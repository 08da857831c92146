"""Builds the messages of the public contract from answers and their events."""

from collections.abc import Sequence
from typing import TypedDict

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.generation.answer import Delta
from gateway.generation.completion import AnswerKey, Event, Finished, Prediction, Started
from gateway.request.validation import SAMPLING_DEFAULTS, RequestLimits, default_max_gen_len
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import SamplingParams
from serving.request_rules import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS


def stream_response(event_number: int, key: AnswerKey, event: Event) -> bytes:
    """The serialized stream response with an event of the answer at `key`.

    The responses of the three streaming RPCs are the same bytes. This runs with every token, and
    setting the fields one by one costs half as much as nesting messages.
    """
    response = chat_pb2.ChatCompleteStreamResponse()
    message = response.event
    message.event_number = event_number
    part: chat_pb2.Started | chat_pb2.Delta | chat_pb2.Finished
    match event:
        case Delta():
            part = message.delta
            part.text = event.text
            if event.tokens:
                part.tokens.extend(event.tokens)
        case Started():
            part = message.started
            part.MergeFrom(_started(event))
        case Finished():
            part = message.finished
            part.MergeFrom(_finished(event))
    part.index = key.index
    part.choice_index = key.choice
    part.SetInParent()
    return response.SerializeToString()


def _started(event: Started) -> chat_pb2.Started:
    return chat_pb2.Started(
        id=event.response_id,
        created=event.created,
        model=event.model,
        prompt_tokens=event.usage.prompt_tokens,
        sampling=event.sampling,
        dropped_turns=event.dropped_turns,
        fingerprint=event.fingerprint,
        determinism=event.determinism,
    )


def _finished(event: Finished) -> chat_pb2.Finished:
    return chat_pb2.Finished(
        finish_reason=event.reason,
        **_stopped_by(event),
        safety_categories=event.safety_categories,
        usage=event.usage,
        failovers=event.failovers,
    )


class _StoppedBy(TypedDict, total=False):
    """One of the two, or none."""

    stop_token_id: int
    stop_string: str


def _stopped_by(finished: Finished) -> _StoppedBy:
    if finished.stop_string:
        return {"stop_string": finished.stop_string}
    if finished.stop_token_id is not None:
        return {"stop_token_id": finished.stop_token_id}
    return {}


class ResponseHead(TypedDict):
    """The fields of a unary response besides its predictions."""

    id: str
    created: Timestamp
    model: str


def response_head(predictions: Sequence[Prediction]) -> ResponseHead:
    """The head of a response with these predictions, at least one."""
    started = predictions[0].started
    return {"id": started.response_id, "created": started.created, "model": started.model}


def prediction_message(prediction: Prediction) -> chat_pb2.Prediction:
    """A prediction without its tokens."""
    return chat_pb2.Prediction(
        index=prediction.key.index,
        choice_index=prediction.key.choice,
        text=prediction.text,
        finish_reason=prediction.finished.reason,
        **_stopped_by(prediction.finished),
        safety_categories=prediction.finished.safety_categories,
        usage=prediction.finished.usage,
        sampling=prediction.started.sampling,
        dropped_turns=prediction.started.dropped_turns,
        fingerprint=prediction.started.fingerprint,
        determinism=prediction.started.determinism,
        failovers=prediction.finished.failovers,
    )


def model_response(
    info: model_pb2.GetModelInfoResponse,
    replicas: int,
    limits: RequestLimits,
    *,
    max_request_bytes: int,
    max_response_bytes: int,
) -> chat_pb2.GetModelResponse:
    """The model that `replicas` ready replicas serve, for a caller with these limits."""
    defaults = SamplingParams(max_gen_len=default_max_gen_len(info.context_length))
    defaults.MergeFrom(SAMPLING_DEFAULTS)
    return chat_pb2.GetModelResponse(
        name=info.name,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        parameters=info.parameters,
        shards=info.shards,
        replicas=replicas,
        dtype=info.dtype,
        quantization=info.quantization,
        fingerprint=info.fingerprint,
        determinism=info.determinism,
        limits=chat_pb2.Limits(
            max_dialogs=limits.max_dialogs,
            max_messages=limits.max_messages,
            max_choices=limits.max_choices,
            max_top_logprobs=MAX_TOP_LOGPROBS,
            max_logprob_token_ids=MAX_LOGPROB_TOKEN_IDS,
            max_sequences=limits.max_sequences,
            max_request_bytes=max_request_bytes,
            max_response_bytes=max_response_bytes,
        ),
        sampling_defaults=defaults,
    )
