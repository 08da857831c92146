"""The methods of `Llama` over gRPC: the result of `Llama.connect`.

Unlike `Llama.build` it has no seed, because the server draws the seed of every sampling.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Self, cast

from client import Client, Delta, InvalidRequestError, Tls, Token, Violation
from client.errors import invalid_request
from client.sync import Stream
from llama.arguments import Arguments, Sampling, checked
from llama.prompt_format.dialog import Message as DialogMessage
from llama.types import (
    ChatPrediction,
    CompletionPrediction,
    Dialog,
    Generation,
    Message,
    chat_prediction,
    completion_prediction,
)
from serving.request_rules import DEFAULT_TEMPERATURE, DEFAULT_TOP_P

# The path of a prompt, or of one of its ids, in an error of the server.
_PROMPT = re.compile(r"(dialogs|prompts|prompt_ids)\[(\d+)\](?:\.ids)?")


@dataclass(slots=True)
class _Answer:
    """The answer to one prompt, as far as it has arrived."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)

    def decoded(self, *, logprobs: bool) -> tuple[str, list[str], list[float] | None]:
        """The text, the tokens' texts, and with `logprobs` their logprobs."""
        return self.text, [token.text for token in self.tokens], self.logprobs if logprobs else None

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]


class RemoteLlama:
    """A model behind a gateway. Use it in a `with` statement, or close it.

    The methods have the arguments and results of those of `Llama.build`, and refuse the same
    arguments with the same ValueError. A call that fails raises a `client.ChasquiError`. If it
    breaks a rule that only the gateway can check, that is an InvalidRequestError, which is also a
    ValueError.

    A call with more prompts than a request may hold (a limit in `GetModel`) sends several requests,
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
        self._max_prompts: int | None = None  # of one request; None until it is known

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
        """Like `Llama.generate`."""
        prompts, sampling = checked(
            Arguments.token_ids, prompt_tokens, temperature, top_p, max_gen_len
        )
        # The gateway sends ids only with logprobs.
        stream = self._client.complete_stream_many
        answers = self._ask(stream, prompts, sampling, logprobs=True, echo=bool(echo))
        ids = [[token.id for token in answer.tokens] for answer in answers]
        return ids, [answer.logprobs for answer in answers] if logprobs else None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Like `Llama.text_completion`."""
        texts, sampling = checked(Arguments.texts, prompts, temperature, top_p, max_gen_len)
        stream = self._client.complete_stream_many
        answers = self._ask(stream, texts, sampling, logprobs=bool(logprobs), echo=bool(echo))
        return [completion_prediction(*each.decoded(logprobs=logprobs)) for each in answers]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = DEFAULT_TEMPERATURE,
        top_p: float = DEFAULT_TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Like `Llama.chat_completion`."""
        read, sampling = checked(Arguments.dialogs, dialogs, temperature, top_p, max_gen_len)
        messages = [_dialog(each) for each in read]
        stream = self._client.chat_stream_many
        answers = self._ask(stream, messages, sampling, logprobs=bool(logprobs))
        return [chat_prediction(*each.decoded(logprobs=logprobs)) for each in answers]

    def _ask(
        self,
        stream: Callable[..., Stream],
        prompts: Sequence[object],
        sampling: Sampling,
        **options: bool,
    ) -> list[_Answer]:
        """The answers to all prompts, in as many requests as the gateway's limit needs.

        The requests are streams, because the gateway limits the bytes of a unary answer.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout

        def left() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        if len(prompts) > 1 and self._max_prompts is None:
            self._max_prompts = self._client.get_model(timeout=left()).limits.max_dialogs
        size = self._max_prompts or 1
        answers = [_Answer() for _ in prompts]
        for begin in range(0, len(prompts), size):
            part = prompts[begin : begin + size]
            arguments = {**asdict(sampling), **options, "timeout": left()}
            try:
                with closing(stream(part, **arguments)) as events:
                    for event in events:
                        if isinstance(event, Delta):
                            answer = answers[begin + event.index]
                            answer.text += event.text
                            answer.tokens += event.tokens
            except InvalidRequestError as error:
                raise _in_the_calls_terms(error, begin) from None
        return answers


def _in_the_calls_terms(error: InvalidRequestError, begin: int) -> InvalidRequestError:
    """The error of a request whose first prompt has the index `begin` in the call."""
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
    # The arguments were checked, so each role is one of three.
    return [cast("Message", {"role": each.role, "content": each.content}) for each in messages]
