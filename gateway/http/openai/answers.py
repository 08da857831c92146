"""The parts that both kinds of OpenAI's answers have: usage, finish reasons, tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.generation.events import AnswerKey, Finished
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
    FINISH_REASON_SAFETY,
    FINISH_REASON_SPECIAL_TAGS,
    FinishReason,
)

# The smallest logprob of OpenAI's API; JSON has no infinity.
MIN_LOGPROB = -9999.0

_FINISH_REASONS: Mapping[int, str] = {
    FINISH_REASON_LENGTH: "length",
    FINISH_REASON_CONTEXT_LENGTH: "length",
    FINISH_REASON_SPECIAL_TAGS: "content_filter",
    FINISH_REASON_SAFETY: "content_filter",
}


def finish_reason(reason: "FinishReason.ValueType") -> str:
    """OpenAI's word for it: stop, length or content_filter."""
    return _FINISH_REASONS.get(reason, "stop")


@dataclass(slots=True)
class UsageSum:
    """The usage of all answers of a request. The `n` answers to a prompt count it once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    _completion_tokens: dict[AnswerKey, int] = field(default_factory=dict)

    def add_started(self, key: AnswerKey, prompt_tokens: int) -> None:
        if key.choice == 0:
            self.prompt_tokens += prompt_tokens

    def add_finished(self, key: AnswerKey, finished: Finished) -> None:
        self._completion_tokens[key] = finished.usage.completion_tokens
        if key.choice == 0:
            self.cached_tokens += finished.usage.cached_prompt_tokens

    def set_completion_tokens(self, key: AnswerKey, count: int) -> None:
        self._completion_tokens[key] = count

    def json(self) -> dict[str, Any]:
        return usage_json(
            self.prompt_tokens, self.cached_tokens, sum(self._completion_tokens.values())
        )


def usage_of(predictions: Iterable[chat_pb2.Prediction]) -> dict[str, Any]:
    """The usage of a unary answer."""
    prompt_tokens = cached_tokens = completion_tokens = 0
    for each in predictions:
        completion_tokens += each.usage.completion_tokens
        if each.choice_index == 0:
            prompt_tokens += each.usage.prompt_tokens
            cached_tokens += each.usage.cached_prompt_tokens
    return usage_json(prompt_tokens, cached_tokens, completion_tokens)


def usage_json(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def logprob_json(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
