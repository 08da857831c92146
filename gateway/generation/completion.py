"""From prompts to events: all generations of a request run at once, and what the replicas make of
them is passed on as it comes. This is the one code path of the four completion RPCs; unary ones
fold it. Whoever iterates `complete` must close it (contextlib.aclosing): that cancels what runs.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration

from gateway.admission.admission import Admitted, Size
from gateway.generation.answer import Answer, Delta
from gateway.generation.generation import Generation, Outcome
from gateway.generation.send_buffer import UnreadEvents
from gateway.replicas.pool import ReplicaPool
from gateway.request.prompts import Prompt
from gateway.request.validation import Options
from gateway.text.detokenizer import Vocabulary
from llama.prompt_format.dialog import UNSAFE_ERROR
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_SPECIAL_TAGS,
    FINISH_REASON_STOP_STRING,
    Determinism,
    FinishReason,
    SamplingParams,
)
from serving.errors import RequestError, unavailable
from serving.security import caller
from serving.telemetry import tracing

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Place:
    """Which generation of a request: the dialog or prompt, and which of the answers to it."""

    index: int
    choice: int


@dataclass(frozen=True, slots=True)
class Started:
    """A generation was begun."""

    usage: chat_pb2.Usage
    seed: int
    fingerprint: str
    determinism: "Determinism.ValueType"
    dropped_turns: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer is complete."""

    reason: "FinishReason.ValueType"
    usage: chat_pb2.Usage
    resumed: int = 0  # how often it went on at another replica
    safety_categories: tuple[str, ...] = ()


Event = Started | Delta | Finished
# With the generation that it belongs to.
PlacedEvent = tuple[Place, Event]


@dataclass(frozen=True, slots=True)
class Prediction:
    """All events of one generation, folded."""

    place: Place
    started: Started
    text: str
    tokens: list[bytes]  # serialized predictions, each with some of the tokens
    finished: Finished


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a dialog or text that the model must not see."""

    text: str
    reason: "FinishReason.ValueType"
    safety_categories: tuple[str, ...] = ()


# Meta's, for a dialog that could pass for part of the prompt format.
SPECIAL_TAGS_REFUSAL = Refusal(UNSAFE_ERROR, FINISH_REASON_SPECIAL_TAGS)


@dataclass(frozen=True, slots=True)
class _Request:
    """One generation as it is asked for."""

    place: Place
    prompt: Prompt | Refusal
    seed: int


@dataclass(frozen=True, slots=True)
class Generations:
    """The generations of a request that run or wait now."""

    running: dict[Place, Generation] = field(default_factory=dict)

    def cancel(self, place: Place) -> None:
        """Ends one, if it runs or waits; its last event still comes."""
        if place in self.running:
            self.running[place].cancel()


async def complete(
    prompts: Sequence[Prompt | Refusal],
    options: Options,
    vocabulary: Vocabulary,
    replicas: ReplicaPool,
    admitted: Admitted,
    *,
    arrived: float,
    made: UnreadEvents[Place],
    generations: Generations,
) -> AsyncGenerator[PlacedEvent, None]:
    """The events of `options.n` generations per prompt, interleaved; a refusal is its own answer.

    Each runs when its turn comes. `arrived` is the time.monotonic of the request's arrival;
    `made`, empty before, belongs to the task that writes to the client. `generations`, empty
    before, holds those that run while it lasts.

    Raises:
        RequestError: among others, RESOURCE_EXHAUSTED where the events are taken too slowly.
    """
    model = replicas.model
    requests = [*_requests(prompts, options)]
    starts = {
        each.place: _start(each.prompt, each.seed, options, model.context_length, vocabulary.eos_id)
        for each in requests
        if isinstance(each.prompt, Prompt)
    }
    running = generations.running
    turns = iter(admitted.queue([*map(_size, starts.values())]))
    try:
        for each in requests:
            if isinstance(prompt := each.prompt, Prompt):
                answer = Answer(prompt.ids, options, vocabulary)
                deliver = _deliver_to(made, each.place)
                running[each.place] = Generation(
                    answer, starts[each.place], next(turns), replicas, deliver
                )
        for each in requests:
            yield each.place, _started(each, model)
            for event in _first_events(each, running.get(each.place), arrived):
                yield each.place, event
        while running:
            place, outcome = await made.get()
            if isinstance(outcome, Exception):
                raise outcome
            for event in _events(running[place], outcome, arrived):
                yield place, event
            if outcome.finish_reason:
                del running[place]
    finally:
        try:
            made.close()
        finally:
            for generation in running.values():
                generation.cancel()


def _requests(prompts: Sequence[Prompt | Refusal], options: Options) -> Iterator[_Request]:
    """Each answer has a seed of its own, so that it can be repeated alone."""
    for index, prompt in enumerate(prompts):
        first_seed = _seed(options.sampling)
        for choice in range(options.n):
            yield _Request(Place(index, choice), prompt, (first_seed + choice) % 2**64)


def _seed(sampling: SamplingParams) -> int:
    return sampling.seed if sampling.HasField("seed") else secrets.randbits(64)


def _start(
    prompt: Prompt, seed: int, options: Options, context_length: int, eos_id: int
) -> model_pb2.StartSequence:
    sampling = SamplingParams()
    sampling.CopyFrom(options.sampling)
    sampling.seed = seed
    sampling.max_gen_len = min(sampling.max_gen_len, context_length - len(prompt.ids))
    return model_pb2.StartSequence(
        prompt_ids=prompt.ids,
        sampling=sampling,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        top_logprobs=options.top_logprobs,
        eos_ids=[eos_id],
        priority=options.priority,
        traceparent=tracing.traceparent(),
        cache_scope=caller.current().cache_scope,
    )


def _size(start: model_pb2.StartSequence) -> Size:
    return Size(len(start.prompt_ids), start.sampling.max_gen_len)


def _deliver_to(made: UnreadEvents[Place], place: Place) -> Callable[[Outcome], None]:
    def deliver(outcome: Outcome) -> None:
        made.put(place, outcome)

    return deliver


def _started(request: _Request, model: model_pb2.GetModelInfoResponse) -> Started:
    prompt_tokens = dropped_turns = 0
    if isinstance(prompt := request.prompt, Prompt):
        prompt_tokens, dropped_turns = len(prompt.ids), prompt.dropped_turns
    return Started(
        chat_pb2.Usage(prompt_tokens=prompt_tokens),
        request.seed,
        model.fingerprint,
        model.determinism,
        dropped_turns,
    )


def _first_events(
    request: _Request, generation: Generation | None, arrived: float
) -> Iterator[Event]:
    """What is known before the model has made anything."""
    if isinstance(refusal := request.prompt, Refusal):
        if refusal.text:
            yield Delta(refusal.text, [])
        usage = chat_pb2.Usage(total_time=_since(arrived))
        yield Finished(refusal.reason, usage, safety_categories=refusal.safety_categories)
    elif generation is not None and (echo := generation.answer.begin()).text:
        yield echo


def _events(
    generation: Generation, token_event: model_pb2.TokenEvent, arrived: float
) -> Iterator[Event]:
    if token_event.HasField("error"):
        raise _failure(token_event.error)
    delta = generation.answer.take(token_event)
    if delta.text or delta.tokens:
        yield delta
    if token_event.finish_reason:
        yield _finished(generation, token_event, arrived)
    elif generation.answer.stopped:
        # The sequence's last event, which tells its usage, is still to come.
        generation.cancel()


def _finished(generation: Generation, last: model_pb2.TokenEvent, arrived: float) -> Finished:
    queued = Duration()
    queued.FromNanoseconds(last.timings.queued.ToNanoseconds() + round(generation.waited * 1e9))
    usage = chat_pb2.Usage(
        prompt_tokens=generation.prompt_tokens,
        cached_prompt_tokens=last.cached_prompt_tokens,
        completion_tokens=generation.answer.completion_tokens,
        queue_time=queued,
        prefill_time=last.timings.prefill,
        decode_time=last.timings.decode,
        compute_time=last.timings.compute,
        total_time=_since(arrived),
    )
    reason = FINISH_REASON_STOP_STRING if generation.answer.stopped else last.finish_reason
    return Finished(reason, usage, generation.resumed)


def _since(arrived: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round((time.monotonic() - arrived) * 1e9))
    return duration


def _failure(error: model_pb2.SequenceError) -> RequestError:
    code = _STATUS_CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.UNAVAILABLE:
        return unavailable(error.message)
    return RequestError(code, error.message)
