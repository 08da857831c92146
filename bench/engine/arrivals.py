"""The effect of new prompts on streams that run (`stall`, `host`), and their wait (`dialog`)."""

import heapq
import statistics
from collections.abc import Iterator, Sequence

from bench.engine.driver import Driver, Job, Load, Prompt, Setting, loaded
from bench.engine.throughput import Loaded
from bench.report import Row

STEPS_BEFORE = 16  # that are measured before the arrival
NEAREST = 5  # decode-only steps that a gap is compared with
UNLIMITED = 1e9  # times a step: never reached


def stall(job: Job, streams: int, context: int, tokens: int) -> Iterator[Row]:
    """`streams` decode when a prompt of `tokens` arrives; with the engine's defaults, and whole.

    A machine that others use, too, changes its speed while a long prompt is computed. So each gap
    is divided by the time of the nearest steps without prompt tokens: all steps before the arrival
    have none, and after it the engine makes such a step from time to time.
    """
    # Streams must outlive the prompt: one token per step, of which eight in nine compute at least
    # four of the prompt's.
    answer = STEPS_BEFORE + tokens // 3 + 64
    room = tokens + 1 + streams * (context + answer)
    sized = job.sized(streams + 1, max(tokens + 1, context + answer), room)
    whole: dict[str, Setting] = {"max_step_tokens": tokens + streams, "max_stall": UNLIMITED}
    for chunks, settings in (("default", {"max_step_tokens": 512}), ("whole", whole)):
        with loaded(sized.with_settings(**settings)) as driver:
            driver.fill(driver.prompts([context] * streams), [answer] * streams)
            steps = _steps_around_arrival(driver, tokens)
        del driver
        yield Row(
            "stall",
            {"weights": job.weights, "chunks": chunks, "streams": streams, "prompt_tokens": tokens},
            _gaps(steps),
        )


def _steps_around_arrival(driver: Driver, tokens: int) -> list[tuple[int, float]]:
    """Prompt tokens and seconds of each step, from before the arrival to the first token."""
    driver.step()
    begin = len(driver.trial.steps)
    for _ in range(STEPS_BEFORE):
        driver.step()
    (prompt,) = driver.prompts([tokens])
    request = driver.add(prompt, 1)
    while not driver.answers[request]:
        driver.step()
    computed = [step.prompt_tokens for step in driver.trial.steps]
    return [*zip(computed, driver.trial.seconds(), strict=True)][begin:]


def _gaps(steps: Sequence[tuple[int, float]]) -> dict[str, float]:
    seconds = [each for _, each in steps]
    before, gaps = seconds[:STEPS_BEFORE], seconds[STEPS_BEFORE:]
    ratios = over_decode_only(steps)
    behind = ratios[STEPS_BEFORE:]
    quiet = [ratio for ratio, (tokens, _) in zip(ratios, steps, strict=True) if not tokens]
    return {
        "step_ms": 1e3 * statistics.median(before),
        "longest_gap_ms": 1e3 * max(gaps),
        "median_gap_ms": 1e3 * statistics.median(gaps),
        "longest_gap_over_step": max(behind),
        "p99_gap_over_step": statistics.quantiles(behind, n=100, method="inclusive")[-1],
        "median_gap_over_step": statistics.median(behind),
        "longest_decode_only_over_step": max(quiet),
        "first_token_of_prompt_s": sum(gaps),
        "steps": len(gaps),
    }


def over_decode_only(steps: Sequence[tuple[int, float]]) -> list[float]:
    """Each step's seconds over the median of the nearest ones without prompt tokens.

    Args:
        steps: prompt tokens and seconds of each, in order; some have no prompt tokens.
    """
    quiet = [(index, seconds) for index, (tokens, seconds) in enumerate(steps) if not tokens]
    ratios = []
    for index, (_, seconds) in enumerate(steps):
        nearest = heapq.nsmallest(NEAREST, ((abs(other - index), took) for other, took in quiet))
        ratios.append(seconds / statistics.median(took for _, took in nearest))
    return ratios


def host(engine: Loaded, load: Load) -> Iterator[Row]:
    """The host's time to launch a step, and that of the step, with prompt tokens and without.

    Two thirds of the streams decode when the prompts of the others arrive at once. On CUDA a step
    of single tokens is a recorded graph, one with prompt tokens is recorded in pieces: then follow
    such steps launched kernel by kernel.
    """
    graphs = engine.driver.graphs
    pieces = graphs.piecewise if graphs else None
    yield from _launches(engine, load, (False, True), in_pieces=pieces is not None)
    if graphs and pieces:
        graphs.piecewise = None
        try:
            yield from _launches(engine, load, (True,), in_pieces=False)
        finally:
            graphs.piecewise = pieces


def _launches(
    engine: Loaded, load: Load, kinds: Sequence[bool], *, in_pieces: bool
) -> Iterator[Row]:
    """Rows for steps without prompt tokens (False), with some (True) or both."""
    driver = engine.driver
    decoding = max(1, load.streams * 2 // 3)
    driver.fill(driver.prompts([load.prompt] * decoding), [load.answer] * decoding)
    driver.step()  # the first without prompts
    for prompt in driver.prompts([load.prompt] * (load.streams - decoding)):
        driver.add(prompt, max(1, load.answer // 4))
    count = load.answer // 4
    for _ in range(count):
        driver.step()
    # With lookahead, a call launches a step and returns the one that was launched by the last call.
    ahead = driver.engine.limits.lookahead
    steps, seconds = driver.trial.steps, driver.trial.seconds()
    measured = range(len(steps) - count, len(steps))
    driver.clear()
    for with_prompts in kinds:
        kind = [i for i in measured if bool(steps[i].prompt_tokens) == with_prompts]
        if not kind:
            continue
        launches = [1e3 * steps[i - ahead].forward for i in kind]
        yield Row(
            "host",
            {
                "weights": engine.job.weights,
                "streams": decoding,
                "prompt_tokens": with_prompts,
                "in_pieces": with_prompts and in_pieces,
            },
            {
                "launch_ms": statistics.median(launches),
                "launch_ms_high": max(launches),
                "step_ms": 1e3 * statistics.median(seconds[i] for i in kind),
                "step_ms_high": 1e3 * max(seconds[i] for i in kind),
                "prompt_tokens_per_step": statistics.median(steps[i].prompt_tokens for i in kind),
                "prompt_tokens_low": min(steps[i].prompt_tokens for i in kind),
                "steps": len(kind),
            },
        )


def dialog(job: Job, turns: int, user: int, answer: int) -> Iterator[Row]:
    """A dialog whose every turn adds `user` tokens and is answered with `answer` tokens."""
    for prefix_cache in (True, False):
        sized = job.sized(1, turns * (user + answer) + 1, prefix_cache=prefix_cache)
        with loaded(sized) as driver:
            # The first prompt of an engine pays for what later ones find ready.
            driver.answer(driver.prompts([user]), 1)
            history: Prompt = ()
            for turn in range(1, turns + 1):
                history += driver.prompts([user])[0]
                cached = driver.engine.load().cached_prompt_tokens
                trial = driver.answer([history], answer)
                yield Row(
                    "dialog",
                    {"weights": job.weights, "prefix_cache": prefix_cache, "turn": turn},
                    {
                        "prompt_tokens": len(history),
                        "first_token_ms": 1e3 * trial.first_token_seconds(),
                        "cached_prompt_tokens": driver.engine.load().cached_prompt_tokens - cached,
                    },
                )
                (request,) = trial.prompts
                history += tuple(driver.answers[request])
        del driver
