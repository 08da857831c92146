"""Outputs of sequences: the tokens that a step added, and how a sequence ended."""

from model_service.engine.sampling.result import SampledToken
from model_service.engine.sequence import (
    FinishReason,
    Sequence,
    SequenceOutput,
    TokenLogprobs,
)


def step_output(
    sequence: Sequence, end: int, made: list[SampledToken], now: float
) -> SequenceOutput:
    """The output of a step that computed a sequence to its end, and made tokens behind that.

    Args:
        sequence: has the tokens already; its times are brought up to date here.
        end: how many tokens of the sequence are in the cache.
        made: the new tokens, a stop token included; empty if the sequence only scores its prompt.
        now: by time.monotonic.
    """
    request = sequence.request
    first = sequence.first_token_at is None
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    if request.prompt_logprobs and first:
        ids, logprobs = prompt_output(sequence)
    reason: FinishReason | None = None
    stop: SampledToken | None = None
    if not made or end + 1 == sequence.limit:
        reason = sequence.length_reason
    if made:
        sequence.last_token_at = now
        sequence.first_token_at = sequence.first_token_at or now
        if made[-1].id in request.stop_ids:
            reason, stop = FinishReason.STOP, made[-1]
            made = made[:-1]
    ids += tuple([token.id for token in made])
    logprobs += tuple([token.logprobs for token in made if token.logprobs is not None])
    if reason is not None:
        return final_output(sequence, reason, ids, logprobs, stop=stop)
    cached = sequence.cached_prompt_tokens if first else 0
    return SequenceOutput(request.request_id, ids, logprobs, cached_prompt_tokens=cached)


def prompt_output(sequence: Sequence) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
    """The prompt's reported ids and their logprobs, which come in front of the answer's."""
    request = sequence.request
    return request.prompt_ids[request.scored_from :], tuple(sequence.prompt_scores)


def final_output(
    sequence: Sequence,
    reason: FinishReason,
    ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    *,
    stop: SampledToken | None = None,
    error: str = "",
) -> SequenceOutput:
    """A sequence's last output, with its timings."""
    return SequenceOutput(
        sequence.request.request_id,
        ids,
        logprobs,
        reason,
        stop_token_id=None if stop is None else stop.id,
        stop_logprobs=None if stop is None else stop.logprobs,
        error=error,
        timings=sequence.timings(),
        cached_prompt_tokens=sequence.cached_prompt_tokens,
    )
