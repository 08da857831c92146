"""From prompts to events: all generations of a request run at once, and what the replicas make of
them is passed on as it comes. This is the one code path of the four completion RPCs; unary ones
fold it. Whoever iterates `complete` must close it (contextlib.aclosing): that cancels what runs.
"""

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration

from gateway.answer import Answer, Delta
from gateway.detokenizer import Vocabulary
from gateway.dialog import UNSAFE_ERROR
from gateway.prompts import Prompt
from gateway.replicas import Deliver, ReplicaPool, RunningSequence
from gateway.request import Options
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_STOP_STRING,
    FINISH_REASON_UNSAFE,
    FinishReason,
    SamplingParams,
)
from serving.errors import RequestError, unavailable

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Started:
    """A generation was accepted."""

    usage: chat_pb2.Usage
    seed: int
    fingerprint: str
    dropped_turns: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer is complete."""

    reason: "FinishReason.ValueType"
    usage: chat_pb2.Usage


Event = Started | Delta | Finished
# With the index of the generation that it belongs to.
IndexedEvent = tuple[int, Event]


@dataclass(frozen=True, slots=True)
class Prediction:
    """All events of one generation, folded."""

    started: Started
    text: str
    tokens: list[chat_pb2.Token]
    finished: Finished


@dataclass(frozen=True, slots=True)
class _Generation:
    prompt: Prompt
    answer: Answer
    sequence: RunningSequence


async def complete(
    prompts: Sequence[Prompt | None],
    options: Options,
    vocabulary: Vocabulary,
    replicas: ReplicaPool,
    arrived: float,
) -> AsyncGenerator[IndexedEvent, None]:
    """The events of all generations, interleaved; a prompt that is None is refused as unsafe.

    `arrived` is the time.monotonic of the request's arrival.
    """
    model = replicas.model
    seeds = [_seed(options.sampling) for _ in prompts]
    made: asyncio.Queue[tuple[int, model_pb2.TokenEvent]] = asyncio.Queue()
    running: dict[int, _Generation] = {}
    try:
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if prompt is not None:
                start = _start(prompt, seed, options, model.context_length, vocabulary.eos_id)
                sequence = replicas.start(start, _deliver_to(made, index))
                answer = Answer(prompt.ids, options, vocabulary)
                running[index] = _Generation(prompt, answer, sequence)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            yield index, _started(prompt, seed, model.fingerprint)
            for event in _first_events(running.get(index), arrived):
                yield index, event
        while running:
            index, token_event = await made.get()
            for event in _events(running[index], token_event, arrived):
                yield index, event
            if token_event.finish_reason:
                del running[index]
    finally:
        for generation in running.values():
            generation.sequence.cancel()


async def fold(events: AsyncIterator[IndexedEvent]) -> list[Prediction]:
    """The predictions of a request, in the order of its generations."""
    started: dict[int, Started] = {}
    texts: defaultdict[int, list[str]] = defaultdict(list)
    tokens: defaultdict[int, list[chat_pb2.Token]] = defaultdict(list)
    finished: dict[int, Finished] = {}
    async for index, event in events:
        match event:
            case Started():
                started[index] = event
            case Delta():
                texts[index].append(event.text)
                tokens[index] += event.tokens
            case Finished():
                finished[index] = event
    return [
        Prediction(started[index], "".join(texts[index]), tokens[index], finished[index])
        for index in sorted(finished)
    ]


def _seed(sampling: SamplingParams) -> int:
    return sampling.seed if sampling.HasField("seed") else secrets.randbits(64)


def _start(
    prompt: Prompt, seed: int, options: Options, context_length: int, eos_id: int
) -> model_pb2.StartSequence:
    sampling = SamplingParams()
    sampling.CopyFrom(options.sampling)
    sampling.seed = seed
    # A prompt that fills the context leaves no room; the model service then ends it with LENGTH.
    room = max(1, context_length - len(prompt.ids))
    sampling.max_gen_len = min(sampling.max_gen_len, room)
    return model_pb2.StartSequence(
        prompt_ids=prompt.ids,
        sampling=sampling,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        top_logprobs=options.top_logprobs,
        stop_ids=[eos_id],
    )


def _deliver_to(made: asyncio.Queue[tuple[int, model_pb2.TokenEvent]], index: int) -> Deliver:
    def deliver(event: model_pb2.TokenEvent) -> None:
        made.put_nowait((index, event))

    return deliver


def _started(prompt: Prompt | None, seed: int, fingerprint: str) -> Started:
    if prompt is None:
        return Started(chat_pb2.Usage(), seed, fingerprint, dropped_turns=0)
    usage = chat_pb2.Usage(prompt_tokens=len(prompt.ids))
    return Started(usage, seed, fingerprint, prompt.dropped_turns)


def _first_events(generation: _Generation | None, arrived: float) -> Iterator[Event]:
    """What is known before the model has made anything."""
    if generation is None:
        yield Delta(UNSAFE_ERROR, [])
        yield Finished(FINISH_REASON_UNSAFE, chat_pb2.Usage(total=_since(arrived)))
    elif (echo := generation.answer.echo()).text:
        yield echo


def _events(
    generation: _Generation, token_event: model_pb2.TokenEvent, arrived: float
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
        generation.sequence.cancel()


def _finished(generation: _Generation, last: model_pb2.TokenEvent, arrived: float) -> Finished:
    usage = chat_pb2.Usage(
        prompt_tokens=len(generation.prompt.ids),
        cached_prompt_tokens=last.cached_prompt_tokens,
        completion_tokens=generation.answer.completion_tokens,
        queued=last.timings.queued,
        prefill=last.timings.prefill,
        decode=last.timings.decode,
        compute=last.timings.compute,
        total=_since(arrived),
    )
    reason = FINISH_REASON_STOP_STRING if generation.answer.stopped else last.finish_reason
    return Finished(reason, usage)


def _since(arrived: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round((time.monotonic() - arrived) * 1e9))
    return duration


def _failure(error: model_pb2.SequenceError) -> RequestError:
    code = _STATUS_CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.UNAVAILABLE:
        return unavailable(error.message)
    return RequestError(code, error.message)
