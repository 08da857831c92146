"""The events of a request's answers, in the gateway's own form."""

from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from llama.prompt_format.dialog import UNSAFE_ERROR
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_SPECIAL_TAGS,
    Determinism,
    FinishReason,
    SamplingParams,
)


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """Identifies one answer of a request: its dialog or prompt, and which of the n answers."""

    index: int
    choice: int


@dataclass(frozen=True, slots=True)
class Started:
    """A generation was begun."""

    response_id: str
    created: Timestamp
    model: str
    usage: chat_pb2.Usage
    sampling: SamplingParams  # as applied
    fingerprint: str
    determinism: "Determinism.ValueType"
    dropped_turns: int
    prompt_format: chat_pb2.PromptFormat


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer."""

    text: str
    tokens: list[chat_pb2.Token]
    completion_tokens: int = 0  # of the answer so far, this delta included


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer is complete."""

    reason: "FinishReason.ValueType"
    usage: chat_pb2.Usage
    failovers: int = 0  # how often it continued at another replica
    stop_token_id: int | None = None
    stop_token: chat_pb2.Token | None = None  # the same with its logprob, if that was asked for
    stop_string: str = ""
    safety_categories: tuple[str, ...] = ()


Event = Started | Delta | Finished
# An event, with the key of its answer.
KeyedEvent = tuple[AnswerKey, Event]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One complete answer: all events of a generation, joined."""

    key: AnswerKey
    started: Started
    text: str
    tokens: list[bytes]  # serialized Prediction messages, each with some of the tokens
    finished: Finished


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a dialog or text that the model must not see."""

    text: str
    reason: "FinishReason.ValueType"
    safety_categories: tuple[str, ...] = ()


# Meta's refusal of a dialog that contains tags of the prompt format.
SPECIAL_TAGS_REFUSAL = Refusal(UNSAFE_ERROR, FINISH_REASON_SPECIAL_TAGS)
