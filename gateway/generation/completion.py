"""Runs the generations of a request and yields the events of their answers.

All generations run at once, and their events are interleaved as they arrive. Close `complete` after
use (contextlib.aclosing): that cancels the generations that still run.
"""

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.admission.admission import Admitted, Size
from gateway.generation.answer import Answer, Delta
from gateway.generation.generation import Generation, Outcome
from gateway.generation.send_buffer import SendBuffer
from gateway.replicas.pool import ReplicaPool
from gateway.request.prompts import Prompt
from gateway.request.validation import Options
from gateway.text.detokenizer import Vocabulary
from llama.prompt_format.dialog import UNSAFE_ERROR
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
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


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer is complete."""

    reason: "FinishReason.ValueType"
    usage: chat_pb2.Usage
    failovers: int = 0  # how often it continued at another replica
    stop_token_id: int | None = None
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


@dataclass(frozen=True, slots=True)
class _Request:
    """The request for one generation."""

    key: AnswerKey
    prompt: Prompt | Refusal
    sampling: SamplingParams  # as applied, without stop strings


@dataclass(frozen=True, slots=True)
class Generations:
    """The running and waiting generations of a request."""

    running: dict[AnswerKey, Generation] = field(default_factory=dict)

    def cancel(self, key: AnswerKey) -> None:
        """Ends one early, if it runs or waits; its last event is still delivered."""
        if key in self.running:
            self.running[key].cancel()


async def complete(
    prompts: Sequence[Prompt | Refusal],
    options: Options,
    vocabulary: Vocabulary,
    replicas: ReplicaPool,
    admitted: Admitted,
    *,
    arrived: float,
    buffer: SendBuffer[AnswerKey, Outcome],
    generations: Generations,
) -> AsyncGenerator[KeyedEvent, None]:
    """The events of `options.n` generations per prompt, interleaved; a Refusal is the whole answer.

    Each generation runs when its ticket is granted. `arrived` is the request's arrival, in seconds
    of time.monotonic. `buffer` belongs to the task that writes to the client. `generations`, empty
    before the call, is kept up to date with those that run or wait.

    Raises:
        RequestError: among others, RESOURCE_EXHAUSTED if the queue is full.
    """
    model = replicas.model
    requests = [*_requests(prompts, options, model.context_length)]
    response_id, created = str(uuid.uuid4()), Timestamp()
    created.GetCurrentTime()
    starts = {
        each.key: _start(each.prompt, each.sampling, options, vocabulary.eos_id)
        for each in requests
        if isinstance(each.prompt, Prompt)
    }
    running = generations.running
    tickets = iter(admitted.queue([*map(_size, starts.values())]))
    try:
        for each in requests:
            if isinstance(prompt := each.prompt, Prompt):
                answer = Answer(prompt.ids, options, vocabulary)
                deliver = partial(buffer.put, each.key)
                running[each.key] = Generation(
                    answer, starts[each.key], next(tickets), replicas, deliver
                )
        for each in requests:
            yield each.key, _started(each, model, options, response_id, created)
            for event in _first_events(each, running.get(each.key), arrived):
                yield each.key, event
        while running:
            key, outcome = await buffer.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome.HasField("error"):
                raise _failure(outcome.error)
            generation = running[key]
            delta = generation.answer.append_event(outcome)
            if delta.text or delta.tokens:
                yield key, delta
            if outcome.finish_reason:
                yield key, _finished(generation, outcome, options, arrived)
                del running[key]
            elif generation.answer.stopped:
                # The last event, which has the usage, is still to come.
                generation.cancel()
    finally:
        buffer.close()
        for generation in running.values():
            generation.cancel()


def _requests(
    prompts: Sequence[Prompt | Refusal], options: Options, context_length: int
) -> Iterator[_Request]:
    """One request per answer, each with its own seed, so that one answer can be repeated alone."""
    for index, prompt in enumerate(prompts):
        first_seed = _seed(options.sampling)
        room = context_length - (len(prompt.ids) if isinstance(prompt, Prompt) else 0)
        for choice in range(options.n):
            sampling = _applied(options.sampling, (first_seed + choice) % 2**64, room)
            yield _Request(AnswerKey(index, choice), prompt, sampling)


def _seed(sampling: SamplingParams) -> int:
    return sampling.seed if sampling.HasField("seed") else secrets.randbits(64)


def _applied(asked: SamplingParams, seed: int, room: int) -> SamplingParams:
    """The sampling parameters of an answer for which the context has `room` tokens left."""
    sampling = SamplingParams()
    sampling.CopyFrom(asked)
    sampling.seed = seed
    sampling.max_gen_len = min(asked.max_gen_len, room)
    sampling.min_gen_len = min(asked.min_gen_len, sampling.max_gen_len)
    return sampling


def _start(
    prompt: Prompt, sampling: SamplingParams, options: Options, eos_id: int
) -> model_pb2.StartSequence:
    return model_pb2.StartSequence(
        prompt_ids=prompt.ids,
        sampling=sampling,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        top_logprobs=options.top_logprobs,
        logprob_token_ids=options.logprob_token_ids,
        eos_ids=[eos_id],
        priority=options.priority,
        traceparent=tracing.traceparent(),
        cache_scope=caller.current().cache_scope,
    )


def _size(start: model_pb2.StartSequence) -> Size:
    return Size(len(start.prompt_ids), start.sampling.max_gen_len)


def _started(
    request: _Request,
    model: model_pb2.GetModelInfoResponse,
    options: Options,
    response_id: str,
    created: Timestamp,
) -> Started:
    prompt_tokens = dropped_turns = 0
    if isinstance(prompt := request.prompt, Prompt):
        prompt_tokens, dropped_turns = len(prompt.ids), prompt.dropped_turns
    sampling = SamplingParams(stop=[stop.text for stop in options.stop])
    sampling.MergeFrom(request.sampling)
    return Started(
        response_id,
        created,
        model.name,
        chat_pb2.Usage(prompt_tokens=prompt_tokens),
        sampling,
        model.fingerprint,
        model.determinism,
        dropped_turns,
    )


def _first_events(
    request: _Request, generation: Generation | None, arrived: float
) -> Iterator[Event]:
    """The events that do not depend on the model's output."""
    if isinstance(refusal := request.prompt, Refusal):
        if refusal.text:
            yield Delta(refusal.text, [])
        usage = chat_pb2.Usage(total_time=_since(arrived))
        yield Finished(refusal.reason, usage, safety_categories=refusal.safety_categories)
    elif generation is not None and (echo := generation.answer.begin()).text:
        yield echo


def _finished(
    generation: Generation, last: model_pb2.TokenEvent, options: Options, arrived: float
) -> Finished:
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
    reason, stop_token_id = last.finish_reason, None
    if generation.answer.stopped:
        reason = FINISH_REASON_STOP_STRING
    elif last.HasField("stop_token_id"):
        stop_token_id = last.stop_token_id
    elif reason == FINISH_REASON_LENGTH and generation.max_gen_len < options.sampling.max_gen_len:
        reason = FINISH_REASON_CONTEXT_LENGTH  # max_gen_len was reduced to the context's room
    return Finished(
        reason,
        usage,
        generation.failovers,
        stop_token_id=stop_token_id,
        stop_string=generation.answer.stop_string,
    )


def _since(arrived: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round((time.monotonic() - arrived) * 1e9))
    return duration


def _failure(error: model_pb2.SequenceError) -> RequestError:
    code = _STATUS_CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.UNAVAILABLE:
        return unavailable(error.message)
    return RequestError(code, error.message)
