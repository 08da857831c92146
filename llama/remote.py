"""The methods of `Llama` over gRPC: what `Llama.connect` returns.

The server draws the seed of every sampling, so unlike `Llama.build` there is no seed to give.
"""

from typing import Self

from client import ChatPrediction as Chat
from client import Client, Tls
from client import TextPrediction as Text
from llama.types import ChatPrediction, CompletionPrediction, Dialog, Generation, Message


class RemoteLlama:
    """A model behind a gateway. Use it in a `with` statement, or close it.

    Every method raises a `client.ChasquiError` when its call fails.
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
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Generation:
        """As `Llama.generate`."""
        predictions = self._client.complete_many(
            prompt_tokens,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=True,  # ids come with them
            echo=echo,
            timeout=self._timeout,
        )
        ids = [[token.id for token in prediction.tokens] for prediction in predictions]
        return ids, [_logprobs(prediction) for prediction in predictions] if logprobs else None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """As `Llama.text_completion`."""
        predictions = self._client.complete_many(
            prompts,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=echo,
            timeout=self._timeout,
        )
        if not logprobs:
            return [{"generation": each.text} for each in predictions]
        return [
            {"generation": each.text, "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in predictions
        ]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """As `Llama.chat_completion`."""
        predictions = self._client.chat_many(
            dialogs,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            timeout=self._timeout,
        )
        if not logprobs:
            return [{"generation": _message(each)} for each in predictions]
        return [
            {"generation": _message(each), "tokens": _texts(each), "logprobs": _logprobs(each)}
            for each in predictions
        ]


def _message(prediction: Chat) -> Message:
    return {"role": "assistant", "content": prediction.content}


def _texts(prediction: Chat | Text) -> list[str]:
    return [token.text for token in prediction.tokens]


def _logprobs(prediction: Chat | Text) -> list[float]:
    return [token.logprob for token in prediction.tokens]
