"""The methods of `Llama` over gRPC: what `Llama.connect` returns.

The server draws the seed of every sampling, so unlike `Llama.build` there is no seed to give.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Self, TypeVar, cast

from client import Client, Delta, InvalidRequestError, Tls, Token, Violation
from client.errors import invalid_request
from client.sync import Stream
from llama.arguments import Arguments, Sampling
from llama.prompt_format.dialog import Message as DialogMessage
from llama.types import ChatPrediction, CompletionPrediction, Dialog, Generation, Message
from serving.request_rules import DEFAULT_TEMPERATURE, DEFAULT_TOP_P

T = TypeVar("T")

# The field that a rule of the server is about: which prompt of the request, and which of its ids.
_PROMPT = re.compile(r"(dialogs|prompts|prompt_ids)\[(\d+)\](?:\.ids)?")


@dataclass(slots=True)
class _Answer:
    """What came of one prompt."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)


class RemoteLlama:
    """A model behind a gateway. Use it in a `with` statement, or close it.

    Methods take and return what those of `Llama.build` do, and refuse the same arguments with the
    same ValueError. A `client.ChasquiError` says why a call failed; where a rule was broken that
    the gateway alone can tell, it is an InvalidRequestError, which is a ValueError, too.

    A call with more prompts than the gateway takes at once (`GetModel` tells how many) is several,
    one after the other. Threads may share one object; their calls run at the same time.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None = None,
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._client = Client(target, tls=tls, api_key=api_key)
        self._timeout = timeout
        self._max_prompts: int | None = None  # in one request; not known yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Generation:
        """As `Llama.generate`."""
        arguments = Arguments()
        prompts = arguments.token_ids(prompt_tokens)
        sampling = arguments.sampling(temperature, top_p, max_gen_len)
        arguments.refuse()
        # Ids come with the logprobs.
        answers = self._complete(prompts, sampling, logprobs=True, echo=echo)
        ids = [[token.id for token in answer.tokens] for answer in answers]
        return ids, [*map(_logprobs, answers)] if logprobs else None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """As `Llama.text_completion`."""
        arguments = Arguments()
        texts = arguments.texts(prompts)
        sampling = arguments.sampling(temperature, top_p, max_gen_len)
        arguments.refuse()
        answers = self._complete(texts, sampling, logprobs=logprobs, echo=echo)
        if not logprobs:
            return [{"generation": each.text} for each in answers]
        return [
            {"generation": each.text, "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in answers
        ]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """As `Llama.chat_completion`."""
        arguments = Arguments()
        messages = [_dialog(each) for each in arguments.dialogs(dialogs)]
        sampling = arguments.sampling(temperature, top_p, max_gen_len)
        arguments.refuse()

        def call(part: Sequence[Dialog], timeout: float | None) -> Stream:
            return self._client.chat_stream_many(
                part,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_gen_len=sampling.max_gen_len,
                logprobs=bool(logprobs),
                timeout=timeout,
            )

        answers = self._in_parts(messages, call)
        if not logprobs:
            return [{"generation": _message(each)} for each in answers]
        return [
            {"generation": _message(each), "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in answers
        ]

    def _complete(
        self,
        prompts: Sequence[str | list[int]],
        sampling: Sampling,
        *,
        logprobs: bool,
        echo: bool,
    ) -> list[_Answer]:
        def call(part: Sequence[str | list[int]], timeout: float | None) -> Stream:
            return self._client.complete_stream_many(
                part,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_gen_len=sampling.max_gen_len,
                logprobs=bool(logprobs),
                echo=bool(echo),
                timeout=timeout,
            )

        return self._in_parts(prompts, call)

    def _in_parts(
        self, prompts: Sequence[T], call: Callable[[Sequence[T], float | None], Stream]
    ) -> list[_Answer]:
        """The answers to all prompts, by as many requests as the gateway's limit makes it.

        They are streams, because the gateway bounds the bytes of a unary answer.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if len(prompts) > 1 and self._max_prompts is None:
            self._max_prompts = self._client.get_model(timeout=left()).limits.max_dialogs
        size = self._max_prompts or 1
        answers = [_Answer() for _ in prompts]
        for begin in range(0, len(prompts), size):
            try:
                with closing(call(prompts[begin : begin + size], left())) as events:
                    for event in events:
                        if isinstance(event, Delta):
                            answer = answers[begin + event.index]
                            answer.text += event.text
                            answer.tokens += event.tokens
            except InvalidRequestError as error:
                raise _in_the_calls_terms(error, begin) from None
        return answers


def _in_the_calls_terms(error: InvalidRequestError, begin: int) -> InvalidRequestError:
    """`error` of the request whose first prompt is the call's number `begin`, from 0."""
    if not error.violations:
        return error

    def path(found: re.Match[str]) -> str:
        name = "prompt_tokens" if found[1] == "prompt_ids" else found[1]
        return f"{name}[{begin + int(found[2])}]"

    violations = (
        Violation(_PROMPT.sub(path, each.field), each.description) for each in error.violations
    )
    moved = invalid_request(violations)
    moved.request_id = error.request_id
    return moved


def _dialog(messages: Sequence[DialogMessage]) -> Dialog:
    # Checked: a role is one of three.
    return [cast("Message", {"role": each.role, "content": each.content}) for each in messages]


def _message(answer: _Answer) -> Message:
    return {"role": "assistant", "content": answer.text}


def _texts(answer: _Answer) -> list[str]:
    return [token.text for token in answer.tokens]


def _logprobs(answer: _Answer) -> list[float]:
    return [token.logprob for token in answer.tokens]
