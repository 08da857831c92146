"""From OpenAI's requests to the messages of the contract, and the way back for the paths and words
of errors.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gateway.http.openai.fields import (
    ChatCompletionBody,
    ChatMessage,
    CompletionBody,
    Prompt,
    TextCompletionBody,
    TextPart,
)
from gateway.request.options import ChatRequest, TextRequest
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from serving.errors import RequestError, Violation, invalid_argument

# OpenAI's default, for texts alone.
DEFAULT_TEXT_TOKENS = 16

# The headers that name a stream, and the last event of it that has arrived.
IDEMPOTENCY_KEY = "Idempotency-Key"
LAST_EVENT_ID = "Last-Event-ID"

_ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "developer": chat_pb2.ROLE_SYSTEM,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
}
_SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "ignore_eos"),
)


@dataclass(frozen=True, slots=True)
class Naming:
    """OpenAI's names of the contract's fields, as regular expressions and their replacements."""

    fields: Sequence[tuple[str, str]]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Errors leave the block in OpenAI's names."""
        try:
            yield
        except RequestError as error:
            raise self._renamed(error) from None

    def _renamed(self, error: RequestError) -> RequestError:
        if error.violations:
            return invalid_argument([*map(self._renamed_violation, error.violations)])
        message = self._said(error.message)
        return RequestError(error.code, message, (), error.retry_after, error.quota)

    def _renamed_violation(self, violation: Violation) -> Violation:
        return Violation(self._said(violation.field), self._said(violation.description))

    def _said(self, text: str) -> str:
        for pattern, replacement in self.fields:
            text = re.sub(pattern, replacement, text)
        return text


_SHARED_NAMES = (
    (r"\bstream_name\b", IDEMPOTENCY_KEY),
    (r"\bafter_event_number\b", LAST_EVENT_ID),
    (r":[0-9a-f]{64}\b", ""),  # the digest in a stream's name
    (r"\b(sampling\.)?min_gen_len\b", "min_tokens"),
    (r"\bsampling\.", ""),
)


def chat_request(body: ChatCompletionBody, stream_name: str) -> tuple[ChatRequest, Naming]:
    """The request, a streaming one if the body asks for a stream, and the names of its fields.

    Raises:
        RequestError: INVALID_ARGUMENT if fields contradict each other.
    """
    _require_stream(body)
    most, newer = body.max_tokens, body.max_completion_tokens
    if most is not None and newer is not None and most != newer:
        rule = f"must be equal to max_completion_tokens, {newer}, where both are given"
        raise invalid_argument([Violation("max_tokens", f"{rule}, not {most}")])
    fields = {
        **_fields(body, newer if most is None else most),
        "dialogs": [dialog(body.messages)],
        "logprobs": bool(body.logprobs),
        "top_logprobs": body.top_logprobs or 0,
    }
    of_length = "max_completion_tokens" if most is None else "max_tokens"
    naming = Naming(
        (
            (r"\bdialogs(\[0\])?\.messages\b", "messages"),
            (r"\bdialogs(\[0\])?", "messages"),
            (r"\b(sampling\.)?max_gen_len\b", of_length),
            *_SHARED_NAMES,
        )
    )
    if body.stream:
        return chat_pb2.ChatCompleteStreamRequest(**fields, stream_name=stream_name), naming
    return chat_pb2.ChatCompleteRequest(**fields), naming


def dialog(messages: Sequence[ChatMessage]) -> chat_pb2.Dialog:
    """The messages of a chat as a dialog."""
    return chat_pb2.Dialog(
        messages=[
            chat_pb2.Message(role=_ROLES[each.role], content=_content(each.content))
            for each in messages
        ]
    )


def text_request(body: TextCompletionBody, stream_name: str) -> tuple[TextRequest, Naming]:
    """The same for a text completion."""
    _require_stream(body)
    most = DEFAULT_TEXT_TOKENS if body.max_tokens is None else body.max_tokens
    prompts, prompt_ids, is_one = _prompts(body.prompt)
    fields = {
        **_fields(body, most),
        "prompts": prompts,
        "prompt_ids": [TokenIds(ids=each) for each in prompt_ids],
        "logprobs": body.logprobs is not None,
        "top_logprobs": body.logprobs or 0,
        "echo": bool(body.echo),
        "exact_continuation": True,
    }
    naming = Naming(
        (
            (r"\bprompts\[0\]|\bprompt_ids\[0\](\.ids)?", "prompt") if is_one else (r"\.ids\b", ""),
            (r"\bprompts\b(?! \*)|\bprompt_ids\b", "prompt"),
            (r"\btop_logprobs\b", "logprobs"),
            (r"\b(sampling\.)?max_gen_len\b", "max_tokens"),
            *_SHARED_NAMES,
        )
    )
    if body.stream:
        return chat_pb2.TextCompleteStreamRequest(**fields, stream_name=stream_name), naming
    return chat_pb2.TextCompleteRequest(**fields), naming


def _require_stream(body: CompletionBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise invalid_argument([Violation("stream_options", "needs stream")])


def _fields(body: CompletionBody, max_gen_len: int | None) -> dict[str, Any]:
    """The fields that are the same in both kinds of requests; absent ones are left out."""
    sampling = SamplingParams(
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        stop_token_ids=body.stop_token_ids,
        logit_bias=body.logit_bias,
        max_gen_len=max_gen_len,
        min_gen_len=body.min_tokens,
        seed=None if body.seed is None else body.seed % 2**64,
        **{name: getattr(body, name) for name in _SAME_NAME},
    )
    return {"model": body.model, "sampling": sampling, "n": body.n, "priority": body.priority or 0}


def _content(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _prompts(prompt: Prompt) -> tuple[list[str], list[list[int]], bool]:
    """The prompts as texts, or as token ids, and whether the body has just one, not in a list."""
    if isinstance(prompt, str):
        return [prompt], [], True
    texts = [each for each in prompt if isinstance(each, str)]
    ids = [each for each in prompt if isinstance(each, int)]
    id_lists = [each for each in prompt if isinstance(each, list)]
    return texts, [ids] if ids else id_lists, bool(ids)
