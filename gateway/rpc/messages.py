"""Builds the messages of the public contract from answers and their events."""

from collections.abc import Sequence
from typing import TypedDict

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.generation.answer import Delta
from gateway.generation.events import AnswerKey, Event, Finished, Prediction, Started
from llama.prompt_format.formats import PromptFormat
from llama.v1 import chat_pb2


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
        prompt_format=event.prompt_format,
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
        prompt_format=prediction.started.prompt_format,
        failovers=prediction.finished.failovers,
    )


def prompt_format_message(prompt_format: PromptFormat) -> chat_pb2.PromptFormat:
    """A prompt format as clients see it."""
    return chat_pb2.PromptFormat(name=prompt_format.name, special_tags=prompt_format.special_tags)
