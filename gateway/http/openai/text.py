"""Answers to text completions as OpenAI's API has them, complete or in chunks."""

import codecs
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from gateway.generation.events import AnswerKey, Delta, Finished, KeyedEvent
from gateway.http.openai.answers import finish_reason, logprob_json, usage_of
from llama.v1 import chat_pb2
from serving.intake.time_slice import TimeSlice

ID_PREFIX = "cmpl-"
# Chunks have the same type.
OBJECT = "text_completion"


async def text_completion(
    response: chat_pb2.TextCompleteResponse, *, logprobs: bool
) -> dict[str, Any]:
    """The complete answer."""
    choices, time_slice = [], TimeSlice()
    for index, each in enumerate(response.predictions):
        tokens = TokenColumns(each.text)
        for token in each.tokens:
            tokens.append(token)
            await time_slice.yield_if_over()
        choices.append(
            {
                "text": each.text,
                "index": index,
                "logprobs": tokens.json() if logprobs else None,
                "finish_reason": finish_reason(each.finish_reason),
            }
        )
    return {
        "id": f"{ID_PREFIX}{response.id}",
        "object": OBJECT,
        "created": response.created.seconds,
        "model": response.model,
        "choices": choices,
        "usage": usage_of(response.predictions),
        "system_fingerprint": response.predictions[0].fingerprint,
    }


async def with_stop_tokens(
    events: AsyncGenerator[KeyedEvent, None],
) -> AsyncGenerator[KeyedEvent, None]:
    """The events, in which the token that ends an answer is the last one of its logprobs.

    Programs that score a prompt with `echo` and one token more, as lm-evaluation-harness does,
    count on an entry for that token, whatever it is, and drop it.
    """
    async with aclosing(events):
        async for key, event in events:
            if isinstance(event, Finished) and event.stop_token is not None:
                yield key, Delta("", [event.stop_token], event.usage.completion_tokens)
            yield key, event


class TextChoices:
    """The choices of chunks."""

    id_prefix = ID_PREFIX
    chunk_object = OBJECT

    def __init__(self, n: int) -> None:
        self._n = n
        self._offsets: dict[AnswerKey, _Offsets] = {}

    def delta(self, key: AnswerKey, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if delta.tokens:
            offsets = self._offsets.setdefault(key, _Offsets(delta.text))
            columns = TokenColumns(delta.text, offsets)
            for token in delta.tokens:
                columns.append(token)
            logprobs = columns.json()
        return self._choice(key, delta.text, logprobs, None)

    def finish(self, key: AnswerKey, finished: Finished) -> dict[str, Any]:
        return self._choice(key, "", None, finish_reason(finished.reason))

    def _choice(
        self, key: AnswerKey, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {
            "text": text,
            "index": key.index * self._n + key.choice,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


class TokenColumns:
    """The logprobs of a text completion: a list for each property of its tokens."""

    def __init__(self, text: str, offsets: "_Offsets | None" = None) -> None:
        self._offsets = _Offsets(text) if offsets is None else offsets
        self._columns: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }

    def append(self, token: chat_pb2.Token) -> None:
        """Adds a token. The first one of a prompt has null for logprobs: nothing predicts it."""
        columns, is_predicted = self._columns, token.rank > 0
        columns["tokens"].append(_shown(token.bytes))
        columns["token_logprobs"].append(logprob_json(token.logprob) if is_predicted else None)
        columns["top_logprobs"].append(_most_probable(token) if is_predicted else None)
        columns["text_offset"].append(self._offsets.next(token.bytes))

    def json(self) -> dict[str, Any]:
        return dict(self._columns)


class _Offsets:
    """The places of tokens in the text, in characters; close to it behind bytes that are no text.

    A token that continues a character has the place of the character.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._next = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True

    def next(self, token: bytes) -> int:
        """The place of the next token."""
        offset, text = self._next, self._decoder.decode(token)
        if text and self._is_first:
            self._is_first = False
            # SentencePiece puts a space in front of a text that is none of the text's.
            self._next -= text.startswith(" ") and not self._text.startswith(" ")
        self._next += len(text)
        return offset


def _most_probable(token: chat_pb2.Token) -> dict[str, float]:
    """The alternatives and the token itself; of those that look the same, the most probable."""
    found: dict[str, float] = {}
    candidates: Iterable[chat_pb2.Token | chat_pb2.TokenLogprob] = (*token.top_logprobs, token)
    for each in candidates:
        found.setdefault(_shown(each.bytes), logprob_json(each.logprob))
    return found


def _shown(token: bytes) -> str:
    """The token's text; where it is a part of a character, its bytes in OpenAI's notation."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
