"""The handlers of chat and text completions: a body becomes a message, the pipeline answers it, and
its response or its events become OpenAI's JSON.
"""

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from gateway.generation.events import KeyedEvent
from gateway.http.exchange import Exchange
from gateway.http.openai.chat import ChatChoices, chat_completion
from gateway.http.openai.fields import ChatCompletionBody, CompletionBody, TextCompletionBody
from gateway.http.openai.requests import (
    IDEMPOTENCY_KEY,
    LAST_EVENT_ID,
    Naming,
    chat_request,
    text_request,
)
from gateway.http.openai.text import TextChoices, text_completion, with_stop_tokens
from gateway.http.sse import Choices, EventWriter, server_sent_events
from gateway.request.options import ChatRequest, TextRequest, choices
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.pipeline import Pipeline
from gateway.rpc.unary import unary_response
from llama.v1 import chat_pb2
from serving.errors import RequestError, Violation, invalid_argument

BodyT = TypeVar("BodyT", bound=CompletionBody)
Request = ChatRequest | TextRequest


@dataclass(frozen=True, slots=True)
class Kind(Generic[BodyT]):
    """The forms of one kind of completions; `message` gets the body and a stream's name."""

    message: Callable[[BodyT, str], tuple[Request, Naming]]
    response_type: type[Any]
    answer: Callable[..., Awaitable[dict[str, Any]]]
    choices: Callable[[int], Choices]


CHAT: Kind[ChatCompletionBody] = Kind(
    chat_request, chat_pb2.ChatCompleteResponse, chat_completion, ChatChoices
)
TEXT: Kind[TextCompletionBody] = Kind(
    text_request, chat_pb2.TextCompleteResponse, text_completion, TextChoices
)


class Completions:
    """Answers completions; `streams` are those of the gRPC servicer, too."""

    def __init__(self, pipeline: Pipeline, streams: NamedStreams) -> None:
        self._pipeline = pipeline
        self._streams = streams

    async def chat(self, exchange: Exchange, body: ChatCompletionBody) -> None:
        await self._complete(CHAT, exchange, body)

    async def text(self, exchange: Exchange, body: TextCompletionBody) -> None:
        await self._complete(TEXT, exchange, body)

    async def _complete(self, kind: Kind[BodyT], exchange: Exchange, body: BodyT) -> None:
        request, naming = kind.message(body, exchange.headers.get(IDEMPOTENCY_KEY, ""))
        stream, options = body.stream, body.stream_options
        del body  # can have megabytes, as the request, and is not needed while the answers are made
        with naming.applied():
            if stream:
                numbered = bool(getattr(request, "stream_name", ""))
                writer = EventWriter(kind.choices(choices(request)), options, numbered=numbered)
                events = self._events(exchange, request, writer)
                del request
                await exchange.stream(events)
                return
            logprobs, answers = request.logprobs, self._run(request, exchange)
            del request
            response = await unary_response(kind.response_type, answers)
            await exchange.answer(await kind.answer(response, logprobs=logprobs))

    def _run(self, request: Request, exchange: Exchange) -> AsyncGenerator[KeyedEvent, None]:
        events = self._pipeline.run(request, exchange)
        has_logprobs = isinstance(request, TextRequest) and request.logprobs
        return with_stop_tokens(events) if has_logprobs else events

    def _events(
        self, exchange: Exchange, request: Request, writer: EventWriter
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; a named one is continued if it has been begun.

        The digest of the request is a part of the name, so a key that is used again for another
        request names another stream. gRPC's names have no colon: the two protocols share none.
        """
        key, after = exchange.headers.get(IDEMPOTENCY_KEY), exchange.headers.get(LAST_EVENT_ID)
        if key is None:
            if after is not None:
                raise invalid_argument([Violation(LAST_EVENT_ID, f"needs {IDEMPOTENCY_KEY}")])
            return server_sent_events(self._run(request, exchange), writer)
        serialized = request.SerializeToString(deterministic=True)
        name = f"{key}:{hashlib.sha256(serialized).hexdigest()}"
        if after is not None:
            return self._streams.resume(name, _event_number(after))
        responses = server_sent_events(self._run(request, exchange), writer)
        try:
            return self._streams.open(name, responses, exchange.time_remaining())
        except RequestError as error:
            if error.code is grpc.StatusCode.ALREADY_EXISTS:
                return self._streams.resume(name, 0)
            # `responses`, which would account for the request, never starts.
            with self._pipeline.accounting.account(request, exchange):
                raise


def _event_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise invalid_argument([Violation(LAST_EVENT_ID, "must be the id of an event, a number")])
    return int(text)
