"""A request's answers, each with its own seed, and what the model service is told of them."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.admission.ticket import Size
from gateway.generation.events import AnswerKey, Refusal
from gateway.request.draft import Prompt
from gateway.request.options import Options
from llama.v1 import model_pb2
from llama.v1.sampling_pb2 import SamplingParams
from serving.security import caller
from serving.telemetry import tracing


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """The request for one answer."""

    key: AnswerKey
    prompt: Prompt | Refusal
    sampling: SamplingParams  # as applied, without stop strings


def answer_requests(
    prompts: Sequence[Prompt | Refusal], options: Options, context_length: int
) -> Iterator[AnswerRequest]:
    """One request per answer, each with its own seed, so that one answer can be repeated alone."""
    for index, prompt in enumerate(prompts):
        first_seed = _seed(options.sampling)
        room = context_length - (len(prompt.ids) if isinstance(prompt, Prompt) else 0)
        for choice in range(options.n):
            sampling = _applied(options.sampling, (first_seed + choice) % 2**64, room)
            yield AnswerRequest(AnswerKey(index, choice), prompt, sampling)


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


def start_message(
    prompt: Prompt, sampling: SamplingParams, options: Options, eos_ids: Sequence[int]
) -> model_pb2.StartSequence:
    return model_pb2.StartSequence(
        prompt_ids=prompt.ids,
        sampling=sampling,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        scored_from=prompt.scored_from,
        top_logprobs=options.top_logprobs,
        logprob_token_ids=options.logprob_token_ids,
        eos_ids=eos_ids,
        priority=options.priority,
        traceparent=tracing.traceparent(),
        cache_scope=caller.current().cache_scope,
    )


def size(start: model_pb2.StartSequence) -> Size:
    return Size(len(start.prompt_ids), start.sampling.max_gen_len)
