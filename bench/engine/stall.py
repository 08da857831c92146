"""What a long prompt does to streams that run: the longest gap between their tokens.

A machine that others use, too, changes its speed within such a prompt. So each gap is divided by
what steps without prompt tokens took at about the same time: before the arrival there is nothing
else, and the engine takes one from time to time.
"""

import heapq
from collections.abc import Iterator, Sequence
from statistics import median, quantiles

from bench.engine.session import Session, Setting, Variant, session
from bench.report import Row
from bench.summary import summarize

BASELINE_STEPS = 16
NEAREST = 5  # steps without prompt tokens that a gap is compared with
NO_PACE = 1e9  # times a step: never reached


def long_prompt(variant: Variant, streams: int, context: int, tokens: int) -> Iterator[Row]:
    """`streams` decode when a prompt of `tokens` arrives; with the engine's defaults, and whole.

    Over a step without prompt tokens, 1 means that nobody noticed.
    """
    whole: dict[str, Setting] = {"max_step_tokens": tokens + streams, "max_stall": NO_PACE}
    variants: tuple[tuple[str, dict[str, Setting]], ...] = (("default", {}), ("whole", whole))
    for chunks, settings in variants:
        yield _arrival(
            variant, settings, chunks=chunks, streams=streams, context=context, tokens=tokens
        )


def _arrival(
    variant: Variant,
    settings: dict[str, Setting],
    *,
    chunks: str,
    streams: int,
    context: int,
    tokens: int,
) -> Row:
    # Streams must outlive the prompt: one token per step, of which eight in nine compute at least
    # four of the prompt's.
    answer = BASELINE_STEPS + tokens // 3 + 64
    length = max(tokens + 1, context + answer)
    total = tokens + 1 + streams * (context + answer)
    with session(variant.options(streams + 1, length, total, settings)) as run:
        run.fill(run.prompts(streams, context), answer)
        steps = [_step(run) for _ in range(BASELINE_STEPS)]
        request = run.add(run.prompt(tokens), 1)
        while run.answers[request] == ():
            steps.append(_step(run))
    gaps = [seconds for _, seconds in steps[BASELINE_STEPS:]]
    ratios = over_bare_steps(steps)
    ratio = summarize(ratios[BASELINE_STEPS:])
    bare = [each for each, (tokens, _) in zip(ratios, steps, strict=True) if not tokens]
    gap = summarize(gaps)
    return Row(
        "stall",
        {
            "precision": variant.precision,
            "chunks": chunks,
            "streams": streams,
            "prompt_tokens": tokens,
        },
        {
            "step_ms": median(seconds for _, seconds in steps[:BASELINE_STEPS]) * 1e3,
            "longest_gap_ms": gap.high * 1e3,
            "median_gap_ms": gap.median * 1e3,
            "longest_gap_over_step": ratio.high,
            "p99_gap_over_step": quantiles(ratios[BASELINE_STEPS:], n=100, method="inclusive")[-1],
            "median_gap_over_step": ratio.median,
            "longest_bare_over_step": max(bare),
            "first_token_of_prompt_s": sum(gaps),
            "steps": gap.count,
        },
    )


def over_bare_steps(steps: Sequence[tuple[int, float]]) -> list[float]:
    """Each step's seconds over the median of the nearest ones without prompt tokens.

    Args:
        steps: prompt tokens and seconds of each, in order; some have none.
    """
    bare = [(place, seconds) for place, (tokens, seconds) in enumerate(steps) if not tokens]
    ratios = []
    for place, (_, seconds) in enumerate(steps):
        nearest = heapq.nsmallest(NEAREST, ((abs(other - place), took) for other, took in bare))
        ratios.append(seconds / median(took for _, took in nearest))
    return ratios


def _step(run: Session) -> tuple[int, float]:
    before = run.engine.load().prompt_tokens
    seconds = run.step().seconds
    return run.engine.load().prompt_tokens - before, seconds
