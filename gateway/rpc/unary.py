"""The response of a unary call: all events of its request in one message of limited size.

gRPC's clients refuse a message of more than 4 MiB by default, after all the work has been done. So
a request whose token details could exceed the limit is refused before it runs, and any other is
stopped as soon as it exceeds it. Until then an answer's tokens are kept serialized: as protobuf
objects they take nine times as much memory.
"""

import math
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypedDict, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.generation.events import (
    AnswerKey,
    Delta,
    Event,
    Finished,
    KeyedEvent,
    Prediction,
    Started,
)
from gateway.request.draft import Prompt
from gateway.request.options import Options
from gateway.request.window import Window
from gateway.rpc.messages import stopped_by
from gateway.text.vocabulary import Vocabulary
from llama.v1 import chat_pb2
from serving.errors import RequestError, Violation, resource_exhausted, unavailable
from serving.intake.time_slice import TimeSlice

ResponseT = TypeVar("ResponseT", chat_pb2.ChatCompleteResponse, chat_pb2.TextCompleteResponse)

# Bytes of a prediction besides its text, tokens and sampling parameters: usage, fingerprint.
PREDICTION_BYTES = 512
# Bytes of a token or an alternative besides its text and bytes: id, logprob, tags and lengths.
_ENTRY_BYTES = 15


def size_violations(
    chosen: Options, sequences: int, window: Window, vocabulary: Vocabulary, max_bytes: int
) -> list[Violation]:
    """The violation of a unary request whose token details could exceed `max_bytes`, estimated from
    the most tokens that it allows and the vocabulary's mean token length.
    """
    if not chosen.logprobs:
        return []
    tokens = min(chosen.sampling.max_gen_len, window.length - 1)
    if chosen.prompt_logprobs:
        tokens = window.length
    size = _tokens_size(sequences * tokens, chosen, vocabulary)
    if size <= max_bytes:
        return []
    rule = (
        f"with {sequences} answers of up to {tokens} tokens could take about {size} bytes, and a "
        f"unary answer may have {max_bytes}: lower sampling.max_gen_len, n or the number of "
        "prompts, or ask for a stream"
    )
    field = "top_logprobs" if chosen.top_logprobs else "logprobs"
    return [Violation("logprob_token_ids" if chosen.logprob_token_ids else field, rule)]


def score_size_violations(
    chosen: Options, prompts: Sequence[Prompt], vocabulary: Vocabulary, max_bytes: int
) -> list[Violation]:
    """The violation of a Score request whose answer would exceed `max_bytes`, by the same estimate
    of its tokens, which are known.
    """
    tokens = sum(len(prompt.ids) - prompt.scored_from for prompt in prompts)
    size = _tokens_size(tokens, chosen, vocabulary) + PREDICTION_BYTES * len(prompts)
    if size <= max_bytes:
        return []
    rule = (
        f"with {len(prompts)} candidates of {tokens} tokens together would take about {size} "
        f"bytes, and a unary answer may have {max_bytes}: give fewer candidates, or lower "
        "top_logprobs"
    )
    field = "top_logprobs" if chosen.top_logprobs else "candidates"
    return [Violation("logprob_token_ids" if chosen.logprob_token_ids else field, rule)]


def _tokens_size(tokens: int, chosen: Options, vocabulary: Vocabulary) -> int:
    entries = tokens * (1 + chosen.top_logprobs + len(chosen.logprob_token_ids))
    return round(entries * (_ENTRY_BYTES + 2 * vocabulary.mean_token_bytes))


class AnswerSize:
    """The bytes of a unary answer so far."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    def add(self, event: Event) -> None:
        """Counts an event; RESOURCE_EXHAUSTED if the answer has more than `max_bytes` with it."""
        match event:
            case Started():
                self._bytes += PREDICTION_BYTES + event.sampling.ByteSize()
                self._bytes += event.prompt_format.ByteSize()
            case Delta():
                # Each token with its tag and length.
                self._bytes += len(event.text.encode())
                self._bytes += sum(token.ByteSize() + 4 for token in event.tokens)
            case Finished():
                self._bytes += len(event.stop_string.encode())
        if self._bytes > self._max_bytes:
            raise _too_large(self._max_bytes)


async def fold(events: AsyncIterator[KeyedEvent]) -> list[Prediction]:
    """The predictions of a request, in the order in which its generations started."""
    started: dict[AnswerKey, Started] = {}
    texts: defaultdict[AnswerKey, list[str]] = defaultdict(list)
    tokens: defaultdict[AnswerKey, list[bytes]] = defaultdict(list)
    finished: dict[AnswerKey, Finished] = {}
    async for key, event in events:
        match event:
            case Started():
                started[key] = event
            case Delta():
                texts[key].append(event.text)
                if event.tokens:
                    part = chat_pb2.Prediction(tokens=event.tokens)
                    tokens[key].append(part.SerializeToString())
            case Finished():
                finished[key] = event
    return [
        Prediction(key, begun, "".join(texts[key]), tokens[key], finished[key])
        for key, begun in started.items()
    ]


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
        **stopped_by(prediction.finished),
        safety_categories=prediction.finished.safety_categories,
        usage=prediction.finished.usage,
        sampling=prediction.started.sampling,
        dropped_turns=prediction.started.dropped_turns,
        fingerprint=prediction.started.fingerprint,
        determinism=prediction.started.determinism,
        prompt_format=prediction.started.prompt_format,
        failovers=prediction.finished.failovers,
    )


async def unary_response(
    response_type: type[ResponseT], events: AsyncGenerator[KeyedEvent, None]
) -> ResponseT:
    """The response made from all events of a request; closes `events`."""
    async with aclosing(events):
        predictions = await fold(events)
    response = response_type(
        **response_head(predictions), predictions=map(prediction_message, predictions)
    )
    for message, prediction in zip(response.predictions, predictions, strict=True):
        await add_tokens(message, prediction)
    return response


async def score_response(events: AsyncGenerator[KeyedEvent, None]) -> chat_pb2.ScoreResponse:
    """The scores made from all events of a Score request; closes `events`.

    UNAVAILABLE if a replica reported more than the candidates' tokens, as those do that do not know
    `StartSequence.scored_from` yet.
    """
    async with aclosing(events):
        predictions = await fold(events)
    started = predictions[0].started
    response = chat_pb2.ScoreResponse(
        **response_head(predictions),
        fingerprint=started.fingerprint,
        determinism=started.determinism,
    )
    for prediction in predictions:
        if prediction.finished.usage.completion_tokens:
            raise unavailable(
                "the model replica is of an older version and cannot score: update it"
            )
        message = chat_pb2.Prediction()
        await add_tokens(message, prediction)
        response.scores.add(
            index=prediction.key.index,
            tokens=message.tokens,
            logprob=math.fsum(token.logprob for token in message.tokens),
            is_greedy=all(token.rank == 1 for token in message.tokens),
            usage=prediction.finished.usage,
        )
    return response


async def add_tokens(message: chat_pb2.Prediction, prediction: Prediction) -> None:
    """Adds a prediction's tokens to its message, in steps that let other tasks run."""
    time_slice = TimeSlice()
    for part in prediction.tokens:
        message.MergeFromString(part)
        await time_slice.yield_if_over()


def _too_large(max_bytes: int) -> RequestError:
    message = (
        f"the answer has more than {max_bytes} bytes, the limit of a unary answer: lower "
        "sampling.max_gen_len, n or the number of prompts, or ask for a stream"
    )
    return resource_exhausted(message, "max_response_bytes", retry_after=None)
