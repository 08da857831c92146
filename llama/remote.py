"""The methods of `Llama` over gRPC: what `Llama.connect` returns.

The server draws the seed of every sampling, so unlike `Llama.build` there is no seed to give.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Self, TypeVar, cast

from client import ChatPrediction as Chat
from client import Client, InvalidRequestError, Tls, Violation
from client import TextPrediction as Text
from client.errors import invalid_request
from gateway.dialog import Message as DialogMessage
from llama.arguments import Arguments, Sampling
from llama.types import ChatPrediction, CompletionPrediction, Dialog, Generation, Message
from serving.request_rules import DEFAULT_TEMPERATURE, DEFAULT_TOP_P

T = TypeVar("T")
P = TypeVar("P", Chat, Text)

# The field that a rule of the server is about: which prompt of the request, and which of its ids.
_PROMPT = re.compile(r"(dialogs|prompts|prompt_ids)\[(\d+)\](?:\.ids)?")


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
        predictions = self._complete(prompts, sampling, logprobs=True, echo=echo)
        ids = [[token.id for token in prediction.tokens] for prediction in predictions]
        return ids, [_logprobs(prediction) for prediction in predictions] if logprobs else None

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
        predictions = self._complete(texts, sampling, logprobs=logprobs, echo=echo)
        if not logprobs:
            return [{"generation": each.text} for each in predictions]
        return [
            {"generation": each.text, "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in predictions
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

        def call(part: Sequence[Dialog], timeout: float | None) -> list[Chat]:
            return self._client.chat_many(
                part,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_gen_len=sampling.max_gen_len,
                logprobs=bool(logprobs),
                timeout=timeout,
            )

        predictions = self._in_parts(messages, call)
        if not logprobs:
            return [{"generation": _message(each)} for each in predictions]
        return [
            {"generation": _message(each), "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in predictions
        ]

    def _complete(
        self,
        prompts: Sequence[str | list[int]],
        sampling: Sampling,
        *,
        logprobs: bool,
        echo: bool,
    ) -> list[Text]:
        def call(part: Sequence[str | list[int]], timeout: float | None) -> list[Text]:
            return self._client.complete_many(
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
        self, prompts: Sequence[T], call: Callable[[Sequence[T], float | None], list[P]]
    ) -> list[P]:
        """The predictions for all prompts, by as many requests as the gateway's limit makes it."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if len(prompts) > 1 and self._max_prompts is None:
            self._max_prompts = self._client.get_model(timeout=left()).limits.max_dialogs
        size = self._max_prompts or 1
        predictions: list[P] = []
        for begin in range(0, len(prompts), size):
            try:
                predictions += call(prompts[begin : begin + size], left())
            except InvalidRequestError as error:
                raise _in_the_calls_terms(error, begin) from None
        return predictions


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


def _message(prediction: Chat) -> Message:
    return {"role": "assistant", "content": prediction.content}


def _texts(prediction: Chat | Text) -> list[str]:
    return [token.text for token in prediction.tokens]


def _logprobs(prediction: Chat | Text) -> list[float]:
    return [token.logprob for token in prediction.tokens]
