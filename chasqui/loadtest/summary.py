"""Summarizes records: rates over the whole run, and distributions of latencies.

Only complete answers are measured; failures are counted by status.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, quantiles

from chasqui.loadtest.records import Run

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics in the unit of the samples; `percentiles` has a value for each of PERCENTILES."""

    count: int
    mean: float
    min: float
    max: float
    percentiles: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        return self.percentiles[PERCENTILES.index(percent)]


@dataclass(frozen=True, slots=True)
class Failures:
    """Requests that ended with the same status, and the message of the first."""

    count: int
    first_message: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The results of a run: tokens and requests of complete answers, latencies in seconds.

    A distribution without samples is None. `queued` is measured by the server (Usage).
    """

    succeeded: int
    failures: dict[str, Failures]
    shortened: int
    finish_reasons: dict[str, int]
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    events: int
    requests_per_second: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    time_to_first_token: Distribution | None
    inter_token_latency: Distribution | None
    time_per_output_token: Distribution | None
    end_to_end_latency: Distribution | None
    queued: Distribution | None
    send_delay: Distribution | None

    @property
    def failed(self) -> int:
        return sum(each.count for each in self.failures.values())


def distribution(samples: Iterable[float | None]) -> Distribution | None:
    """The distribution of the samples other than None; None if there are none.

    Percentiles interpolate linearly between the two nearest samples in order; the least sample is
    percentile 0, the greatest 100 (definition 7 of Hyndman and Fan, 1996; NumPy's default).
    """
    present = [sample for sample in samples if sample is not None]
    if not present:
        return None
    if len(present) == 1:
        percentiles = tuple(present * len(PERCENTILES))
    else:
        per_mille = quantiles(present, n=1000, method="inclusive")
        percentiles = tuple(per_mille[round(10 * percent) - 1] for percent in PERCENTILES)
    return Distribution(len(present), fmean(present), min(present), max(present), percentiles)


def summarize(run: Run) -> Summary:
    records = [record for record, _ in run.successes]
    usages = [success.usage for _, success in run.successes]
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    output_tokens = sum(usage.completion_tokens for usage in usages)

    def per_second(amount: int) -> float:
        return amount / run.seconds if run.seconds else 0.0

    return Summary(
        succeeded=len(records),
        failures=_failures(run),
        shortened=sum(record.shortened for record in run.records),
        finish_reasons=Counter(success.finish_reason.name for _, success in run.successes),
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        output_tokens=output_tokens,
        events=sum(len(record.arrivals) for record in records),
        requests_per_second=per_second(len(records)),
        prompt_tokens_per_second=per_second(prompt_tokens),
        output_tokens_per_second=per_second(output_tokens),
        time_to_first_token=distribution(record.time_to_first_token for record in records),
        inter_token_latency=distribution(chain.from_iterable(record.gaps for record in records)),
        time_per_output_token=distribution(record.time_per_output_token for record in records),
        end_to_end_latency=distribution(record.end_to_end for record in records),
        queued=distribution(usage.queue_time.total_seconds() for usage in usages),
        send_delay=distribution(record.sent - record.intended for record in run.records),
    )


def tokens_per_second(run: Run, bins: int) -> Sequence[float]:
    """Output tokens per second in each of `bins` equal parts of the run.

    An answer's tokens are spread evenly over its events, whose numbers of tokens are unknown.
    """
    totals = [0.0] * bins
    width = run.seconds / bins
    for record, success in run.successes:
        times = record.arrivals or (record.ended,)
        for time in times:
            index = min(int(time / width), bins - 1)
            totals[index] += success.usage.completion_tokens / len(times) / width
    return totals


def _failures(run: Run) -> dict[str, Failures]:
    found: dict[str, Failures] = {}
    for _, failure in run.failures:
        seen = found.get(failure.status, Failures(0, failure.message))
        found[failure.status] = Failures(seen.count + 1, seen.first_message)
    return found
