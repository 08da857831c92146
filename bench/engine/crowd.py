"""Steps of a full engine, each against its own limit, and where the device waits for the host.

The first row has sequences of mixed lengths that all decode; in the second, one of them is replaced
by a new prompt in each step.
"""

import itertools
import random
import statistics
from collections.abc import Iterator

from bench.engine.driver import Step
from bench.engine.roofline import Work
from bench.engine.throughput import Load, Loaded
from bench.engine.trace import record, trace_rows
from bench.report import Row


def crowd(loaded: Loaded, load: Load, steps: int, traced_steps: int) -> Iterator[Row]:
    """`load.streams` sequences with prompts of up to `load.prompt` tokens, a ninth at least."""
    sequences = _Crowd(loaded, load)
    sequences.step()  # the first without prompts
    for arrivals in (0, 1):
        rates = loaded.measure_rates()
        preempted = loaded.driver.engine.load().preemptions
        taken, works = sequences.steps(steps, arrivals)
        least = (loaded.job.network.least_seconds(work, rates) for work in works)
        ratios = [seconds / limit for seconds, limit in zip(taken, least, strict=True) if limit]
        yield Row(
            "crowd",
            {
                "weights": loaded.job.weights,
                "sequences": load.streams,
                "longest_prompt": load.prompt,
                "arrivals_per_step": arrivals,
            },
            {
                "step_ms": 1e3 * statistics.median(taken),
                "step_ms_high": 1e3 * max(taken),
                "over_limit": statistics.median(ratios),
                "over_limit_high": max(ratios),
                "preemptions": loaded.driver.engine.load().preemptions - preempted,
            },
        )
        if not arrivals:
            trace = record(sequences.step, traced_steps, loaded.job.device)
            yield from trace_rows(trace, load.streams, statistics.median(taken))


class _Crowd:
    """The sequences that run, with the lengths of their contexts."""

    def __init__(self, loaded: Loaded, load: Load) -> None:
        self._driver = loaded.driver
        self._load = load
        self._random = random.Random(0)
        prompts = [self._length() for _ in range(load.streams)]
        answers = [load.answer] * load.streams
        self._contexts = self._driver.fill(self._driver.prompts(prompts), answers)
        self._waiting: dict[int, int] = {}  # lengths of prompts without a token yet

    def steps(self, count: int, arrivals: int) -> tuple[list[float], list[Work]]:
        """Seconds and work of each of `count` steps, with so many new prompts in each."""
        ends, works = [], []
        for _ in range(count + 1):
            for _ in range(arrivals):
                self._replace_oldest()
            step, work = self.step()
            ends.append(step.ended)
            works.append(work)
        return [after - before for before, after in itertools.pairwise(ends)], works[1:]

    def step(self) -> tuple[Step, Work]:
        step = self._driver.step()
        decoding = [self._contexts[each] for each in step.tokens if each in self._contexts]
        for request, count in step.tokens.items():
            known = self._waiting.pop(request, None) or self._contexts[request]
            self._contexts[request] = known + count
        prompts = Work.part_of_prompts(step.prompt_tokens, self._load.prompt / 2)
        return step, Work.decode(decoding) + prompts

    def _replace_oldest(self) -> None:
        oldest = next(iter(self._contexts))
        del self._contexts[oldest]
        self._driver.cancel(oldest)
        (prompt,) = self._driver.prompts([self._length()])
        self._waiting[self._driver.add(prompt, self._load.answer)] = len(prompt)

    def _length(self) -> int:
        return self._random.randint(max(1, self._load.prompt // 9), self._load.prompt)
