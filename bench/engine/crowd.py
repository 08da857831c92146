"""Steps of a full engine, each against its own limit, and where the device waits for the host.

The first row has sequences of mixed lengths that all decode; in the second, one of them is replaced
by a new prompt in each step.
"""

import random
import statistics
from collections.abc import Iterator

from bench.engine.driver import Load
from bench.engine.throughput import Loaded
from bench.engine.trace import record, trace_rows
from bench.report import Row


def crowd(loaded: Loaded, load: Load, steps: int, traced_steps: int) -> Iterator[Row]:
    """`load.streams` sequences with prompts of up to `load.prompt` tokens, a ninth at least."""
    driver, source = loaded.driver, random.Random(0)

    def prompt_length() -> int:
        return source.randint(max(1, load.prompt // 9), load.prompt)

    prompts = driver.prompts(prompt_length() for _ in range(load.streams))
    sequences = [*driver.fill(prompts, [load.answer] * load.streams)]  # the oldest first
    driver.step()  # the first without prompts
    medians = []
    for arrivals in (0, 1):
        rates = loaded.measure_rates()
        preempted = driver.engine.load().preemptions
        for _ in range(steps + 1):  # the first ends what was measured before
            if arrivals:
                driver.cancel(sequences.pop(0))
                (prompt,) = driver.prompts([prompt_length()])
                sequences.append(driver.add(prompt, load.answer))
            driver.step()
        seconds, works = driver.trial.seconds()[-steps:], driver.trial.works()[-steps:]
        least = (loaded.job.network.least_seconds(work, rates) for work in works)
        ratios = [taken / limit for taken, limit in zip(seconds, least, strict=True) if limit]
        medians.append(statistics.median(seconds))
        yield Row(
            "crowd",
            {
                "weights": loaded.job.weights,
                "sequences": load.streams,
                "longest_prompt": load.prompt,
                "arrivals_per_step": arrivals,
            },
            {
                "step_ms": 1e3 * medians[-1],
                "step_ms_high": 1e3 * max(seconds),
                "over_limit": statistics.median(ratios),
                "over_limit_high": max(ratios),
                "preemptions": driver.engine.load().preemptions - preempted,
            },
        )
    # Last, because the profiler slows the host down.
    while not all(driver.answers[each] for each in sequences):
        driver.step()
    trace = record(driver.step, traced_steps, loaded.job.device)
    yield from trace_rows(trace, load.streams, medians[0])
