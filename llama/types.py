"""The dictionaries of Meta's API (llama/generation.py), key for key."""

from typing import Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = list[Message]


class CompletionPrediction(TypedDict):
    """The continuation of a text; `tokens` and `logprobs` only if asked for."""

    generation: str
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


class ChatPrediction(TypedDict):
    """The answer to a dialog; `tokens` and `logprobs` only if asked for."""

    generation: Message
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


# Per prompt: token ids, and with `logprobs` their logprobs.
Generation = tuple[list[list[int]], list[list[float]] | None]


def completion_prediction(
    text: str, tokens: list[str], logprobs: list[float] | None
) -> CompletionPrediction:
    """Without logprobs the tokens are left out, too."""
    if logprobs is None:
        return {"generation": text}
    return {"generation": text, "tokens": tokens, "logprobs": logprobs}


def chat_prediction(text: str, tokens: list[str], logprobs: list[float] | None) -> ChatPrediction:
    """Without logprobs the tokens are left out, too."""
    message: Message = {"role": "assistant", "content": text}
    if logprobs is None:
        return {"generation": message}
    return {"generation": message, "tokens": tokens, "logprobs": logprobs}
