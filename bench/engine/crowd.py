"""Steps of a full engine, each against its own bound, and where the device waits for the host.

The first row has sequences of mixed lengths that all decode; in the second, one of them is replaced
by a new prompt in each step.
"""

import itertools
import random
import statistics
from collections.abc import Iterator

import torch

from bench.engine.driver import Driver, Step
from bench.engine.roofline import Card, Network, Work
from bench.engine.trace import record, trace_rows
from bench.gpu.sizes import Sizes
from bench.report import Row


def crowd(
    driver: Driver, network: Network, card: Card, sizes: Sizes, device: torch.device
) -> Iterator[Row]:
    """As many sequences as the engine runs at once."""
    sequences = _Crowd(driver, sizes)
    sequences.step()  # the first without prompts
    for arrivals in (0, 1):
        preempted = driver.engine.load().preemptions
        taken, works = sequences.steps(arrivals)
        ratios = [
            seconds / network.least_seconds(work, card)
            for seconds, work in zip(taken, works, strict=True)
        ]
        middle = statistics.median(ratios)
        yield Row(
            "crowd",
            {
                "sequences": sizes.crowd,
                "prompts": f"{sizes.crowd_prompts[0]}–{sizes.crowd_prompts[1]}",
                "arrivals_per_step": arrivals,
            },
            {
                "step_ms": 1e3 * statistics.median(taken),
                "step_ms_high": 1e3 * max(taken),
                "over_limit": middle,
                "over_limit_high": max(ratios),
                "highest_over_median": max(ratios) / middle,
                "preemptions": driver.engine.load().preemptions - preempted,
            },
        )
        if not arrivals:
            trace = record(sequences.step, sizes.traced_steps, device)
            yield from trace_rows(trace, sizes.crowd, statistics.median(taken))


class _Crowd:
    """The sequences that run, with the lengths of their contexts."""

    def __init__(self, driver: Driver, sizes: Sizes) -> None:
        self._driver = driver
        self._sizes = sizes
        self._random = random.Random(0)
        prompts = [self._length() for _ in range(sizes.crowd)]
        answers = [sizes.crowd_answer] * sizes.crowd
        self._contexts = driver.fill(driver.prompts(prompts), answers)
        self._waiting: dict[int, int] = {}  # lengths of prompts without a token yet

    def steps(self, arrivals: int) -> tuple[list[float], list[Work]]:
        """Seconds and work of each step that is measured, with so many new prompts in each."""
        ends, works = [], []
        for _ in range(self._sizes.crowd_steps + 1):
            for _ in range(arrivals):
                self._replace_oldest()
            step, work = self.step()
            ends.append(step.ended)
            works.append(work)
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        return seconds, works[1:]

    def step(self) -> tuple[Step, Work]:
        step = self._driver.step()
        decoding = [self._contexts[each] for each in step.tokens if each in self._contexts]
        for request, count in step.tokens.items():
            known = self._waiting.pop(request, None) or self._contexts[request]
            self._contexts[request] = known + count
        mean = sum(self._sizes.crowd_prompts) / 2
        return step, Work.decode(decoding) + Work.part_of_prompts(step.prompt_tokens, mean)

    def _replace_oldest(self) -> None:
        oldest = next(iter(self._contexts))
        del self._contexts[oldest]
        self._driver.cancel(oldest)
        (prompt,) = self._driver.prompts([self._length()])
        self._waiting[self._driver.add(prompt, self._sizes.crowd_answer)] = len(prompt)

    def _length(self) -> int:
        return self._random.randint(*self._sizes.crowd_prompts)
