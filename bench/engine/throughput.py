"""Prefill and decode on one loaded engine: tokens per second, and the share of the roofline.

The first trial of each load is not counted: it pays for what later ones find ready, such as
buffers, packed weights and touched pages.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from bench.engine.driver import Driver, Job, Load, Trial
from bench.engine.roofline import Rates, Work
from bench.report import Row, spread


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, and the best that its device can do."""

    job: Job
    driver: Driver
    measure_rates: Callable[[], Rates]
    rounds: int

    def trials(self, load: Load) -> Iterator[tuple[Rates, Trial]]:
        """One trial per round, each with the rates of the same minute."""
        self.driver.answer_load(load)
        for _ in range(self.rounds):
            yield self.measure_rates(), self.driver.answer_load(load)


def decode(case: str, loaded: Loaded, load: Load) -> Row:
    """The steps in which all streams decode; and the whole, from the arrival to the last token."""
    network = loaded.job.network
    samples: dict[str, list[float]] = defaultdict(list)
    step_ms: list[float] = []
    rate: list[float] = []
    for rates, trial in loaded.trials(load):
        decoding, seconds = trial.all_decode(), trial.seconds()
        least = [network.least_seconds(work, rates) for work in trial.works()]
        taken, whole = sum(seconds[decoding]), sum(seconds)
        read = trial.decode_bandwidth(network)
        forward = sum(step.forward for step in trial.steps[decoding])
        rate.append(trial.decode_rate())
        step_ms += (1e3 * each for each in seconds[decoding])
        samples["share_of_read_bandwidth"].append(read / rates.read)
        samples["share_of_copy_bandwidth"].append(read / rates.copy)
        samples["share_of_limit"].append(sum(least[decoding]) / taken)
        samples["share_outside_forward"].append(1 - forward / taken)
        samples["with_prompts_tokens_per_s"].append(load.streams * load.answer / whole)
        samples["with_prompts_share_of_limit"].append(sum(least) / whole)
    return Row(
        case,
        {
            "weights": loaded.job.weights,
            "streams": load.streams,
            "prompt_tokens": load.prompt,
            "answer_tokens": load.answer,
        },
        {
            **spread("tokens_per_s", rate),
            **spread("step_ms", step_ms),
            **{name: median(values) for name, values in samples.items()},
        },
    )


def first_token(case: str, loaded: Loaded, load: Load) -> Row:
    """One prompt in one step, from its arrival to its first token."""
    network, work = loaded.job.network, Work.prompt(load.prompt)
    trials = [(rates, trial.first_token_seconds()) for rates, trial in loaded.trials(load)]
    limits = [network.least_seconds(work, rates) for rates, _ in trials]
    return Row(
        case,
        {"weights": loaded.job.weights, "prompt_tokens": load.prompt},
        {
            "tokens_per_s": load.prompt / median(seconds for _, seconds in trials),
            **spread("ms", [1e3 * seconds for _, seconds in trials]),
            "limit_ms": 1e3 * median(limits),
            "over_limit": median(
                seconds / limit for (_, seconds), limit in zip(trials, limits, strict=True)
            ),
            "share_of_matrix_rate": median(
                network.computing_seconds(work, rates) / seconds for rates, seconds in trials
            ),
        },
    )
