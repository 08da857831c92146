"""A sequence: one prompt with the growing answer, and all that the engine knows about it.

Only the engine's thread touches a Sequence; only a SequenceOutput leaves the engine.
"""

import enum
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from model_service.engine.block_content import BlockContent
from model_service.engine.pending_token import is_pending
from serving.request_rules import (
    DEFAULT_FREQUENCY_PENALTY,
    DEFAULT_MIN_P,
    DEFAULT_PRESENCE_PENALTY,
    DEFAULT_REPETITION_PENALTY,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the meaning of each field is in protos/llama/v1/sampling.proto."""

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = DEFAULT_TOP_P
    top_k: int | None = None
    min_p: float = DEFAULT_MIN_P
    min_gen_len: int = 0
    seed: int = 0
    repetition_penalty: float = DEFAULT_REPETITION_PENALTY
    presence_penalty: float = DEFAULT_PRESENCE_PENALTY
    frequency_penalty: float = DEFAULT_FREQUENCY_PENALTY
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        return self.temperature <= 0

    @property
    def has_penalties(self) -> bool:
        """Whether the logits are changed before the temperature divides them."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request to the engine for one answer."""

    request_id: Hashable
    prompt_ids: tuple[int, ...]  # prompt, then `offset` tokens that another replica made
    max_gen_len: int  # tokens of the answer, the `offset` ones included
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    offset: int = 0
    logprobs: bool = False
    prompt_logprobs: bool = False
    scored_from: int = 0  # with prompt_logprobs: the first prompt token that is reported
    top_logprobs: int = 0
    logprob_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_scope: str = ""  # it shares no blocks with sequences of other scopes

    @property
    def answer_start(self) -> int:
        """Index of the answer's first token in the sequence."""
        return len(self.prompt_ids) - self.offset

    def masks_stops_at(self, position: int) -> bool:
        """Whether the token at `position` comes too early to end the answer."""
        return position < self.answer_start + self.sampling.min_gen_len


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = enum.auto()
    LENGTH = enum.auto()  # max_gen_len tokens
    CONTEXT_LENGTH = enum.auto()  # prompt and answer fill the context
    CANCELLED = enum.auto()
    REFUSED = enum.auto()  # the request breaks a limit of the engine
    FAILED = enum.auto()  # the network gave no usable logits


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's own logprob and rank, and the logprobs of other tokens at its position."""

    logprob: float
    rank: int = 0  # from 1, the most probable; 0 where nothing predicts the token
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens as (id, logprob), best first
    requested: tuple[float, ...] = ()  # of the request's logprob_token_ids


# For the first token of a prompt: nothing comes before it that could predict it.
UNPREDICTED = TokenLogprobs(0.0)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds."""

    queued: float  # from arrival to the first step
    prefill: float  # from the first step to the first generated token
    decode: float  # from the first generated token to the last
    compute: float  # share of step time, by tokens computed


class SequenceOutput(NamedTuple):  # one per sequence and step: a dataclass is slower to create
    """The output of a step for one sequence."""

    request_id: Hashable
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per id, if asked for
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # with STOP
    stop_logprobs: TokenLogprobs | None = None  # of the stop token, if asked for
    timings: Timings | None = None  # with finish_reason
    # With the first ids and with finish_reason: found in the cache at the first start.
    cached_prompt_tokens: int = 0
    error: str = ""  # with REFUSED and FAILED


class Status(enum.Enum):
    """Where a sequence stands in its life; the scheduler and the engine move it on."""

    WAITING = enum.auto()  # in the queue, without blocks
    RUNNING = enum.auto()  # holds blocks; steps compute its tokens
    LAST_STEP = enum.auto()  # holds blocks; the step in flight is its last
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request inside the engine."""

    request: GenerationRequest
    limit: int  # most tokens that prompt and answer may have together
    tokens: list[int]  # prompt, then answer; at the end perhaps pending ones
    arrival: int  # order of arrival: the youngest is preempted first
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the cache, or in the step in flight
    contents: list[BlockContent] = field(default_factory=list)  # of full blocks, as far as needed
    num_published: int = 0  # full blocks of the table that others can find
    cached_at_start: int | None = None  # tokens found in the cache when it first ran
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)  # so far, of those wanted
    arrived_at: float = field(default_factory=time.monotonic)
    first_step_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    compute: float = 0.0

    @classmethod
    def from_request(cls, request: GenerationRequest, context: int, arrival: int) -> "Sequence":
        limit = min(context, request.answer_start + request.max_gen_len)
        sequence = cls(request, limit, list(request.prompt_ids), arrival)
        if request.prompt_logprobs and not request.scored_from:
            sequence.prompt_scores.append(UNPREDICTED)
        return sequence

    @property
    def unscored(self) -> int:
        """The first prompt token whose logprob is to be computed; past the prompt when done."""
        if not self.request.prompt_logprobs:
            return len(self.request.prompt_ids)
        return max(1, self.request.scored_from + len(self.prompt_scores))

    @property
    def is_running(self) -> bool:
        return self.status is Status.RUNNING or self.status is Status.LAST_STEP

    @property
    def num_known(self) -> int:
        """Tokens in front of the pending ones."""
        known = len(self.tokens)
        while known and is_pending(self.tokens[known - 1]):
            known -= 1
        return known

    @property
    def generates(self) -> bool:
        """Whether there is room for another token."""
        return len(self.tokens) < self.limit

    @property
    def needs_no_step(self) -> bool:
        """Whether it is complete as it stands."""
        return not self.generates and self.unscored >= len(self.request.prompt_ids)

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens found in the cache when it first ran; 0 when it never did."""
        return min(self.cached_at_start or 0, self.request.answer_start)

    @property
    def length_reason(self) -> FinishReason:
        """Why it ends at its limit."""
        wanted = self.request.answer_start + self.request.max_gen_len
        return FinishReason.CONTEXT_LENGTH if self.limit < wanted else FinishReason.LENGTH

    def timings(self) -> Timings:
        now = time.monotonic()
        first_step = self.first_step_at or now
        first_token = self.first_token_at or now
        return Timings(
            queued=first_step - self.arrived_at,
            prefill=first_token - first_step,
            decode=(self.last_token_at or first_token) - first_token,
            compute=self.compute,
        )
