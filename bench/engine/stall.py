"""What a long prompt does to streams that run: the longest gap between their tokens."""

from collections.abc import Iterator

from bench.engine.session import Setting, Variant, session
from bench.report import Row
from bench.summary import summarize

BASELINE_STEPS = 16
NO_PACE = 1e9  # times a step: never reached


def long_prompt(variant: Variant, streams: int, context: int, tokens: int) -> Iterator[Row]:
    """`streams` decode when a prompt of `tokens` arrives; with the engine's defaults, and whole.

    The gap is divided by the median step before the arrival, so 1 means that nobody noticed.
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
    # Streams must outlive the prompt: one token per step, and a step computes at least one block.
    answer = BASELINE_STEPS + tokens // 16 + 64
    length = max(tokens + 1, context + answer)
    total = tokens + 1 + streams * (context + answer)
    with session(variant.options(streams + 1, length, total, settings)) as run:
        run.fill(run.prompts(streams, context), answer)
        baseline = summarize([run.step().seconds for _ in range(BASELINE_STEPS)])
        request = run.add(run.prompt(tokens), 1)
        gaps, arrived = [], False
        while not arrived:
            step = run.step()
            gaps.append(step.seconds)
            arrived = bool(step.tokens.get(request))
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
            "step_ms": baseline.median * 1e3,
            "longest_gap_ms": gap.high * 1e3,
            "median_gap_ms": gap.median * 1e3,
            "longest_gap_over_step": gap.high / baseline.median,
            "first_token_of_prompt_s": sum(gaps),
            "steps": gap.count,
        },
    )
