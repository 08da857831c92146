"""Builds the messages of a stream from the events of its answers."""

from typing import TypedDict

from gateway.generation.events import AnswerKey, Delta, Event, Finished, Started
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
        **stopped_by(event),
        safety_categories=event.safety_categories,
        usage=event.usage,
        failovers=event.failovers,
    )


class StoppedBy(TypedDict, total=False):
    """One of the two, or none."""

    stop_token_id: int
    stop_string: str


def stopped_by(finished: Finished) -> StoppedBy:
    """The token or string that ended an answer, as fields of its message."""
    if finished.stop_string:
        return {"stop_string": finished.stop_string}
    if finished.stop_token_id is not None:
        return {"stop_token_id": finished.stop_token_id}
    return {}


def prompt_format_message(prompt_format: PromptFormat) -> chat_pb2.PromptFormat:
    """A prompt format as clients see it."""
    return chat_pb2.PromptFormat(name=prompt_format.name, special_tags=prompt_format.special_tags)
