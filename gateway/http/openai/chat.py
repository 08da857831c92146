"""Answers to chat completions as OpenAI's API has them, complete or in chunks."""

from collections.abc import Iterable
from typing import Any

from gateway.generation.events import AnswerKey, Delta, Finished
from gateway.http.openai.answers import finish_reason, logprob_json, usage_of
from llama.v1 import chat_pb2
from serving.intake.time_slice import TimeSlice

ID_PREFIX = "chatcmpl-"


async def chat_completion(
    response: chat_pb2.ChatCompleteResponse, *, logprobs: bool
) -> dict[str, Any]:
    """The complete answer."""
    choices, time_slice = [], TimeSlice()
    for index, each in enumerate(response.predictions):
        tokens = []
        for token in each.tokens:
            tokens.append(_token(token))
            await time_slice.yield_if_over()
        message = {"role": "assistant", "content": each.text, "refusal": None}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": {"content": tokens, "refusal": None} if logprobs else None,
                "finish_reason": finish_reason(each.finish_reason),
            }
        )
    return {
        "id": f"{ID_PREFIX}{response.id}",
        "object": "chat.completion",
        "created": response.created.seconds,
        "model": response.model,
        "choices": choices,
        "usage": usage_of(response.predictions),
        "system_fingerprint": response.predictions[0].fingerprint,
    }


class ChatChoices:
    """The choices of chunks. The first one of each answer has the role of its author."""

    id_prefix = ID_PREFIX
    chunk_object = "chat.completion.chunk"

    def __init__(self, n: int) -> None:
        self._n = n
        self._begun: set[AnswerKey] = set()

    def delta(self, key: AnswerKey, delta: Delta) -> dict[str, Any]:
        choice = self._choice(key, self._content(key, delta.text), None)
        if delta.tokens:
            choice["logprobs"] = {"content": [*map(_token, delta.tokens)], "refusal": None}
        return choice

    def finish(self, key: AnswerKey, finished: Finished) -> dict[str, Any]:
        delta = {} if key in self._begun else self._content(key, "")
        return self._choice(key, delta, finish_reason(finished.reason))

    def _content(self, key: AnswerKey, text: str) -> dict[str, str]:
        if key in self._begun:
            return {"content": text}
        self._begun.add(key)
        return {"role": "assistant", "content": text}

    def _choice(self, key: AnswerKey, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return {"index": key.index * self._n + key.choice, "delta": delta, "finish_reason": reason}


def _token(token: chat_pb2.Token) -> dict[str, Any]:
    return {**_alternative(token), "top_logprobs": _alternatives(token.top_logprobs)}


def _alternatives(tokens: Iterable[chat_pb2.TokenLogprob]) -> list[dict[str, Any]]:
    return [_alternative(each) for each in tokens]


def _alternative(token: chat_pb2.Token | chat_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.bytes.decode(errors="replace"),
        "logprob": logprob_json(token.logprob),
        "bytes": [*token.bytes],
    }
