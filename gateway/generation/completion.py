"""Runs the generations of a request and yields the events of their answers.

All generations run at once, and their events are interleaved as they arrive. Close `complete` after
use (contextlib.aclosing): that cancels the generations that still run.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.admission.admission import Admitted
from gateway.generation.answer import Answer
from gateway.generation.answer_requests import AnswerRequest, answer_requests, size, start_message
from gateway.generation.events import AnswerKey, Delta, Finished, KeyedEvent, Refusal, Started
from gateway.generation.generation import Generation, Outcome
from gateway.generation.send_buffer import SendBuffer
from gateway.replicas.pool import ReplicaPool
from gateway.request.draft import Prompt
from gateway.request.options import Options
from gateway.text.vocabulary import Vocabulary
from llama.v1 import chat_pb2, model_pb2
from llama.v1.sampling_pb2 import (
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP_STRING,
    SamplingParams,
)
from serving.errors import RequestError, unavailable

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


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
    prompt_format: chat_pb2.PromptFormat,
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
    requests = [*answer_requests(prompts, options, model.context_length)]
    response_id, created = str(uuid.uuid4()), Timestamp()
    created.GetCurrentTime()
    starts = {
        each.key: start_message(each.prompt, each.sampling, options, vocabulary.eos_ids)
        for each in requests
        if isinstance(each.prompt, Prompt)
    }
    running = generations.running
    tickets = iter(admitted.queue([*map(size, starts.values())]))
    try:
        for each in requests:
            if isinstance(prompt := each.prompt, Prompt):
                answer = Answer(prompt.ids[prompt.scored_from :], options, vocabulary)
                deliver = partial(buffer.put, each.key)
                running[each.key] = Generation(
                    answer, starts[each.key], next(tickets), replicas, deliver
                )
        for each in requests:
            yield (
                each.key,
                _started(each, model, options, response_id, created, prompt_format=prompt_format),
            )
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


def _started(
    request: AnswerRequest,
    model: model_pb2.GetModelInfoResponse,
    options: Options,
    response_id: str,
    created: Timestamp,
    *,
    prompt_format: chat_pb2.PromptFormat,
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
        prompt_format,
    )


def _first_events(
    request: AnswerRequest, generation: Generation | None, arrived: float
) -> Iterator[Delta | Finished]:
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
    reason, stop_token_id, stop_token = last.finish_reason, None, None
    if generation.answer.stopped:
        reason = FINISH_REASON_STOP_STRING
    elif last.HasField("stop_token_id"):
        stop_token_id, stop_token = last.stop_token_id, generation.answer.stop_token(last)
    elif reason == FINISH_REASON_LENGTH and generation.max_gen_len < options.sampling.max_gen_len:
        reason = FINISH_REASON_CONTEXT_LENGTH  # max_gen_len was reduced to the context's room
    return Finished(
        reason,
        usage,
        generation.failovers,
        stop_token_id=stop_token_id,
        stop_token=stop_token,
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
