"""Chunks of a stream as server-sent events.

The headers are sent as soon as the request is accepted, before the first token. In a named stream
a comment goes with them, from which a client without any token can resume. Other streams have none,
because some clients, such as `vllm bench serve`, misread what follows a comment.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from pydantic_core import to_json

from gateway.generation.events import AnswerKey, Delta, Event, Finished, KeyedEvent, Started
from gateway.http.openai.answers import UsageSum
from gateway.http.openai.fields import StreamOptions


class Choices(Protocol):
    """Makes the choices of chunks."""

    id_prefix: str
    chunk_object: str

    def delta(self, key: AnswerKey, delta: Delta) -> dict[str, Any]:
        """The choice of a chunk with more of an answer."""

    def finish(self, key: AnswerKey, finished: Finished) -> dict[str, Any]:
        """The choice of the last chunk of an answer."""


class EventWriter:
    """Makes one server-sent event of each event of a request's answers.

    `numbered` events have the ids 1, 2, 3 …, by which a client can resume.
    """

    def __init__(self, choices: Choices, options: StreamOptions | None, *, numbered: bool) -> None:
        self._choices = choices
        self._options = options or StreamOptions()
        self._numbered = numbered
        self._number = 0
        self._chunk: dict[str, Any] = {}
        self._usage = UsageSum()

    def write(self, key: AnswerKey, event: Event) -> bytes | None:
        """The bytes to send; None if there are none for this event."""
        match event:
            case Started():
                return self._start(key, event)
            case Delta():
                self._usage.set_completion_tokens(key, event.completion_tokens)
                choice = self._choices.delta(key, event)
            case Finished():
                self._usage.add_finished(key, event)
                choice = self._choices.finish(key, event)
        self._chunk["choices"] = [choice]
        if self._options.continuous_usage_stats:
            self._chunk["usage"] = self._usage.json()
        return self._event(b"data: " + to_json(self._chunk))

    def end(self) -> Iterator[bytes]:
        """The events behind the last one of the answers."""
        if self._options.include_usage:
            last = {**self._chunk, "choices": [], "usage": self._usage.json()}
            yield self._event(b"data: " + to_json(last))
        yield self._event(b"data: [DONE]")

    def _start(self, key: AnswerKey, started: Started) -> bytes | None:
        self._usage.add_started(key, started.usage.prompt_tokens)
        if self._chunk:
            return None
        self._chunk = {
            "id": f"{self._choices.id_prefix}{started.response_id}",
            "object": self._choices.chunk_object,
            "created": started.created.seconds,
            "model": started.model,
            "system_fingerprint": started.fingerprint,
        }
        return self._event(b": accepted") if self._numbered else b""

    def _event(self, line: bytes) -> bytes:
        if not self._numbered:
            return line + b"\n\n"
        self._number += 1
        return b"id: %d\n%s\n\n" % (self._number, line)


async def server_sent_events(
    events: AsyncGenerator[KeyedEvent, None], writer: EventWriter
) -> AsyncGenerator[bytes, None]:
    """The events of a request's answers as they are sent; closes `events`."""
    async with aclosing(events):
        async for key, event in events:
            if (sent := writer.write(key, event)) is not None:
                yield sent
    for sent in writer.end():
        yield sent
