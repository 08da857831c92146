"""Converts between the wire's messages and the engine's values, and checks requests.

The gateway checks its clients' requests by the same rules. This second check keeps a faulty caller
from harming the sequences of others.
"""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

from llama.v1 import model_pb2, sampling_pb2
from model_service.engine.limits import EngineLimits
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
    Timings,
    TokenLogprobs,
)
from serving.errors import Violation, invalid_argument
from serving.request_rules import (
    logprob_token_ids_violations,
    sampling_violations,
    top_logprobs_violations,
)

_FINISH_REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.CONTEXT_LENGTH: sampling_pb2.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.CANCELLED: sampling_pb2.FINISH_REASON_CANCELLED,
}
INVALID_ARGUMENT, INTERNAL = 3, 13  # google.rpc.Code


def generation_request(
    start: model_pb2.StartSequence, stream: int, limits: EngineLimits
) -> GenerationRequest:
    """The engine's request for a `StartSequence`, known to it as (stream, sequence_id).

    Raises:
        RequestError: INVALID_ARGUMENT with every field that breaks its rule.
    """
    sampling = _sampling(start.sampling)
    violations = _violations(start, sampling, limits)
    if violations:
        raise invalid_argument(violations)
    wire = start.sampling
    return GenerationRequest(
        request_id=(stream, start.sequence_id),
        prompt_ids=tuple(start.prompt_ids),
        max_gen_len=wire.max_gen_len if wire.HasField("max_gen_len") else limits.context_length - 1,
        sampling=sampling,
        stop_ids=_stop_ids(start),
        offset=start.generated_tokens,
        logprobs=start.logprobs,
        prompt_logprobs=start.prompt_logprobs,
        scored_from=start.scored_from,
        top_logprobs=start.top_logprobs,
        logprob_token_ids=tuple(start.logprob_token_ids),
        priority=start.priority,
        cache_scope=start.cache_scope,
    )


def _stop_ids(start: model_pb2.StartSequence) -> frozenset[int]:
    """`ignore_eos` is about the model's own end; ids that the client names always count."""
    ends = () if start.sampling.ignore_eos else start.eos_ids
    return frozenset([*ends, *start.sampling.stop_token_ids])


def token_event(sequence_id: str, output: SequenceOutput) -> model_pb2.TokenEvent:
    """The wire's event for the output of a step."""
    entries = output.logprobs
    if output.stop_logprobs is not None:
        entries += (output.stop_logprobs,)
    event = model_pb2.TokenEvent(
        sequence_id=sequence_id,
        ids=output.ids,
        cached_prompt_tokens=output.cached_prompt_tokens,
        logprobs=[entry.logprob for entry in entries],
        ranks=[entry.rank for entry in entries],
        top=[_top(entry) for entry in entries] if any(e.top for e in entries) else (),
        requested_logprobs=_requested(entries),
        stop_token_id=output.stop_token_id,
    )
    if output.timings is not None:
        event.timings.CopyFrom(_timings(output.timings))
    match output.finish_reason:
        case None:
            pass
        case FinishReason.REFUSED:
            event.error.CopyFrom(
                model_pb2.SequenceError(code=INVALID_ARGUMENT, message=output.error)
            )
        case FinishReason.FAILED:
            event.error.CopyFrom(model_pb2.SequenceError(code=INTERNAL, message=output.error))
        case reason:
            event.finish_reason = _FINISH_REASONS[reason]
    return event


def _sampling(wire: sampling_pb2.SamplingParams) -> SamplingParams:
    """The parameters that are present; the engine's defaults are the contract's."""
    names = [entry.name for entry in dataclasses.fields(SamplingParams)]
    present = {
        name: getattr(wire, name)
        for name in names
        if name != "logit_bias" and wire.HasField(name)  # type: ignore[arg-type]  # checked by tests
    }
    return SamplingParams(**present, logit_bias=dict(wire.logit_bias))


def _violations(
    start: model_pb2.StartSequence, sampling: SamplingParams, limits: EngineLimits
) -> list[Violation]:
    def required(name: str, rule: str, holds: bool) -> list[Violation]:
        return [] if holds else [Violation(f"start.{name}", rule)]

    return [
        *required("sequence_id", "must not be empty", bool(start.sequence_id)),
        *sampling_violations(start.sampling, limits.vocab_size, "start.sampling."),
        *required(
            "sampling.seed",
            "must be present when temperature is above 0",
            sampling.greedy or start.sampling.HasField("seed"),
        ),
        *top_logprobs_violations(start.top_logprobs, "start.top_logprobs"),
        *logprob_token_ids_violations(
            start.logprob_token_ids, limits.vocab_size, "start.logprob_token_ids"
        ),
    ]


def _top(entry: TokenLogprobs) -> model_pb2.TopLogprobs:
    return model_pb2.TopLogprobs(
        ids=[token for token, _ in entry.top], logprobs=[value for _, value in entry.top]
    )


def _requested(entries: Sequence[TokenLogprobs]) -> list[float]:
    """The requested logprobs of all positions in a row; 0 where nothing predicts the token."""
    count = max((len(entry.requested) for entry in entries), default=0)
    return [value for entry in entries for value in entry.requested or [0.0] * count]


def _timings(timings: Timings) -> model_pb2.Timings:
    message = model_pb2.Timings()
    for name, seconds in dataclasses.asdict(timings).items():
        getattr(message, name).FromTimedelta(timedelta(seconds=seconds))
    return message
