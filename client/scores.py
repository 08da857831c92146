"""Answers about tokens and their probabilities: of Tokenize, Detokenize and Score.

Names are the contract's; `protos/llama/v1/chat.proto` documents each field.
"""

import math
from dataclasses import dataclass
from datetime import datetime

from client.results import Determinism, Token, Usage, datetime_of, determinism, tokens_of, usage_of
from llama.v1 import chat_pb2


@dataclass(frozen=True, slots=True)
class TextToken:
    """One token of a text; `offset` is where it begins there, in bytes of UTF-8."""

    id: int
    text: str
    bytes: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The token ids of a text or a dialog, and its tokens if they were asked for."""

    ids: tuple[int, ...]
    tokens: tuple[TextToken, ...]


@dataclass(frozen=True, slots=True)
class DetokenizedText:
    """The text of token ids; `bytes` is exact even if characters are incomplete at its ends."""

    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a candidate is behind its prompt."""

    index: int
    tokens: tuple[Token, ...]  # the candidate's
    logprob: float  # of the candidate: the sum of its tokens'
    is_greedy: bool  # each of its tokens is the most probable one
    usage: Usage
    # Fields of the response, equal for all of its scores:
    fingerprint: str
    determinism: Determinism
    id: str
    created: datetime
    model: str

    @property
    def perplexity(self) -> float:
        """The perplexity of the candidate: e to the power of its mean negative logprob."""
        return math.exp(-self.logprob / len(self.tokens))


def tokenizations(response: chat_pb2.TokenizeResponse) -> list[Tokenization]:
    return [
        Tokenization(
            ids=tuple(each.ids),
            tokens=tuple(TextToken(t.id, t.text, t.bytes, t.offset) for t in each.tokens),
        )
        for each in response.tokenizations
    ]


def detokenized_texts(response: chat_pb2.DetokenizeResponse) -> list[DetokenizedText]:
    return [DetokenizedText(each.text, each.bytes) for each in response.texts]


def scores(response: chat_pb2.ScoreResponse) -> list[Score]:
    return [
        Score(
            index=each.index,
            tokens=tokens_of(each.tokens),
            logprob=each.logprob,
            is_greedy=each.is_greedy,
            usage=usage_of(each.usage),
            fingerprint=response.fingerprint,
            determinism=determinism(response.determinism),
            id=response.id,
            created=datetime_of(response.created),
            model=response.model,
        )
        for each in response.scores
    ]
