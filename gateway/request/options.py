"""The options of a request, with defaults filled in, and the limits that they must keep."""

from dataclasses import dataclass

from gateway.request.window import Window
from gateway.text.stop_strings import StopString
from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import SamplingParams
from serving.request_rules import (
    DEFAULT_FREQUENCY_PENALTY,
    DEFAULT_MIN_P,
    DEFAULT_PRESENCE_PENALTY,
    DEFAULT_REPETITION_PENALTY,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
)
from serving.security.caller import CallerLimits

MIN_PRIORITY, MAX_PRIORITY = -100, 100
ChatRequest = chat_pb2.ChatCompleteRequest | chat_pb2.ChatCompleteStreamRequest
TextRequest = chat_pb2.TextCompleteRequest | chat_pb2.TextCompleteStreamRequest
# The requests whose answers the model computes.
ModelRequest = ChatRequest | TextRequest | chat_pb2.ScoreRequest
UnaryRequest = chat_pb2.ChatCompleteRequest | chat_pb2.TextCompleteRequest | chat_pb2.ScoreRequest


# The values of absent fields; `max_gen_len` has a default too, which depends on the context length.
SAMPLING_DEFAULTS = SamplingParams(
    temperature=DEFAULT_TEMPERATURE,
    top_p=DEFAULT_TOP_P,
    min_p=DEFAULT_MIN_P,
    repetition_penalty=DEFAULT_REPETITION_PENALTY,
    presence_penalty=DEFAULT_PRESENCE_PENALTY,
    frequency_penalty=DEFAULT_FREQUENCY_PENALTY,
    min_gen_len=0,
    ignore_eos=False,
)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The configured limits of a request."""

    max_dialogs: int
    max_messages: int
    max_choices: int
    max_sequences: int  # of all requests, running or waiting
    max_priority: int = MAX_PRIORITY

    def within(self, key: CallerLimits) -> "RequestLimits":
        """These limits, lowered to those of an API key.

        Without this, the queue would advise a request that alone exceeds its key's limit to retry.
        """
        max_sequences = self.max_sequences
        if key.max_sequences is not None:
            max_sequences = min(max_sequences, key.max_sequences)
        return RequestLimits(
            max_dialogs=min(self.max_dialogs, max_sequences),
            max_messages=self.max_messages,
            max_choices=self.max_choices,
            max_sequences=max_sequences,
            max_priority=min(self.max_priority, key.max_priority),
        )


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a checked request."""

    sampling: SamplingParams  # defaults filled in, without `stop` and perhaps without `seed`
    stop: tuple[StopString, ...]
    logprobs: bool
    top_logprobs: int
    logprob_token_ids: tuple[int, ...] = ()
    echo: bool = False
    exact_continuation: bool = False
    n: int = 1  # answers to each dialog or prompt
    priority: int = 0

    @property
    def prompt_logprobs(self) -> bool:
        """Whether the model reports the prompt's tokens, in front of the answer's."""
        return self.echo and self.logprobs


def options(request: ChatRequest | TextRequest, context_length: int) -> Options:
    """The options of a request without violations."""
    sampling = SamplingParams()
    sampling.CopyFrom(SAMPLING_DEFAULTS)
    sampling.max_gen_len = default_max_gen_len(context_length)
    sampling.MergeFrom(request.sampling)
    stop = tuple(StopString.compile(text) for text in sampling.stop)
    del sampling.stop[:]
    echo = exact_continuation = False
    if isinstance(request, TextRequest):
        echo, exact_continuation = request.echo, request.exact_continuation
    return Options(
        sampling,
        stop,
        request.logprobs,
        request.top_logprobs,
        tuple(request.logprob_token_ids),
        echo=echo,
        exact_continuation=exact_continuation,
        n=choices(request),
        priority=request.priority,
    )


def score_options(request: chat_pb2.ScoreRequest) -> Options:
    """The options of a request without violations: the prompts are scored, nothing is generated."""
    sampling = SamplingParams(temperature=0, max_gen_len=0)
    return Options(
        sampling,
        stop=(),
        logprobs=True,
        top_logprobs=request.top_logprobs,
        logprob_token_ids=tuple(request.logprob_token_ids),
        echo=True,
        priority=request.priority,
    )


def choices(request: ChatRequest | TextRequest) -> int:
    """Answers to each dialog or prompt of a request."""
    return request.n if request.HasField("n") else 1


def answer_room(
    policy: "chat_pb2.ContextPolicy.ValueType", window: Window, max_gen_len: int
) -> int | None:
    """Tokens to keep free for an answer by dropping turns; None: no turns may be dropped."""
    if policy != chat_pb2.CONTEXT_POLICY_DROP_OLDEST_TURNS:
        return None
    return window.answer_room(max_gen_len)


def default_max_gen_len(context_length: int) -> int:
    """Meta's default, all of the context but one token; at least 1."""
    return max(1, context_length - 1)
