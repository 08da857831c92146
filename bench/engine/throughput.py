"""Prefill and decode on one loaded engine: tokens per second, and the share of the roofline.

The first trial of each load is not counted: it pays for what later ones find ready, such as
buffers, packed weights and touched pages.

Findings on a CPU of two AVX2 cores. oneDNN's packed float32 kernels read 23 to 25 GB/s with one
row, `F.linear` 16 to 19; matrices below 2^20 elements stay plain because the packed kernel takes
20 µs to set up and `F.linear` 3. A layer-by-layer profile of int8 with one stream: of 18 ms, 12.4
are in the matrices, 2 in quantizing their inputs, and 3 in about 25 small operations per layer.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.engine.driver import Driver, Job, Trial
from bench.engine.roofline import Rates, Work
from bench.report import Row, spread


@dataclass(frozen=True, slots=True)
class Load:
    """Equal requests that arrive at once."""

    streams: int
    prompt: int  # tokens of each
    answer: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, and what its device can do at best."""

    job: Job
    driver: Driver
    measure_rates: Callable[[], Rates]  # on a CPU anew each time, as others use it
    rounds: int

    def trials(self, load: Load) -> Iterator[tuple[Rates, Trial]]:
        """One trial per round, each with the rates of the same minute."""
        for number in range(self.rounds + 1):
            rates = self.measure_rates() if number else None
            trial = self.driver.answer(
                self.driver.prompts([load.prompt] * load.streams), load.answer
            )
            if rates is not None:
                yield rates, trial


def decode(case: str, loaded: Loaded, load: Load) -> Row:
    """The steps in which all streams decode; and the whole, from the arrival to the last token."""
    network = loaded.job.network
    samples: dict[str, list[float]] = {}
    step_ms: list[float] = []

    def observe(**values: float) -> None:
        for name, value in values.items():
            samples.setdefault(name, []).append(value)

    for rates, trial in loaded.trials(load):
        decoding, seconds, works = trial.all_decode(), trial.seconds(), trial.works()
        least = [network.least_seconds(work, rates) for work in works]
        taken = sum(seconds[decoding])
        read = trial.decode_bandwidth(network)
        step_ms += (1e3 * each for each in seconds[decoding])
        observe(
            tokens_per_s=trial.decode_rate(),
            share_of_read_bandwidth=read / rates.read,
            share_of_copy_bandwidth=read / rates.copy,
            share_of_limit=sum(least[decoding]) / taken,
            share_outside_forward=1 - sum(s.forward for s in trial.steps[decoding]) / taken,
            with_prompts_tokens_per_s=load.streams * load.answer / sum(seconds),
            with_prompts_share_of_limit=sum(least) / sum(seconds),
        )
    return Row(
        case,
        {
            "weights": loaded.job.weights,
            "streams": load.streams,
            "prompt_tokens": load.prompt,
            "answer_tokens": load.answer,
        },
        {
            **spread("tokens_per_s", samples.pop("tokens_per_s")),
            **spread("step_ms", step_ms),
            **{name: statistics.median(values) for name, values in samples.items()},
        },
    )


def first_token(case: str, loaded: Loaded, load: Load) -> Row:
    """One prompt in one step, from its arrival to its first token."""
    network, work = loaded.job.network, Work.prompt(load.prompt)
    seconds, matrix, limits = [], [], []
    for rates, trial in loaded.trials(load):
        seconds.append(trial.arrivals()[0][0] - trial.started)
        matrix.append(network.computing_seconds(work, rates) / seconds[-1])
        limits.append(network.least_seconds(work, rates))
    return Row(
        case,
        {"weights": loaded.job.weights, "prompt_tokens": load.prompt},
        {
            "tokens_per_s": load.prompt / statistics.median(seconds),
            **spread("ms", [1e3 * each for each in seconds]),
            "limit_ms": 1e3 * statistics.median(limits),
            "over_limit": statistics.median(map(float.__truediv__, seconds, limits)),
            "share_of_matrix_rate": statistics.median(matrix),
        },
    )
