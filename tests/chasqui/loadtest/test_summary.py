"""Latencies from records, and the arithmetic of their distributions."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.loadtest.records import Failure, Record, Run, Success
from chasqui.loadtest.summary import PERCENTILES, distribution, summarize, tokens_per_second
from client import FinishReason, Usage

seconds = st.floats(0, 1e6)


def usage(completion_tokens: int) -> Usage:
    durations = [timedelta(seconds=1)] * 5
    return Usage(10, 5, completion_tokens, *durations)


def answered(tokens: int, *arrivals: float, ended: float, intended: float = 0.0) -> Record:
    outcome = Success(FinishReason.LENGTH, usage(tokens))
    return Record(0, intended, intended + 0.5, arrivals, ended, shortened=False, outcome=outcome)


def failed(status: str, message: str) -> Record:
    return Record(0, 0.0, 0.0, (), 0.1, shortened=False, outcome=Failure(status, message))


def run_of(*records: Record, lasting: float = 10.0) -> Run:
    return Run(datetime.now(UTC), records, lasting, cpu_seconds=1.0, cpu_share=0.1)


@given(st.lists(seconds, min_size=1, max_size=300))
def test_percentiles_are_those_of_numpy(samples: list[float]) -> None:
    found = distribution(samples)

    assert found is not None
    assert found.percentiles == pytest.approx(np.percentile(samples, PERCENTILES).tolist())


@given(st.lists(seconds, min_size=1, max_size=300))
def test_percentiles_rise_from_the_least_sample_to_the_greatest(samples: list[float]) -> None:
    found = distribution(samples)

    assert found is not None
    values = [found.min, *found.percentiles, found.max]
    assert all(low <= high or low == pytest.approx(high) for low, high in pairwise(values))
    assert found.count == len(samples)


@given(st.lists(seconds, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(samples: list[float], random: object) -> None:
    assert distribution(samples) == distribution(sorted(samples))


def test_nothing_is_a_distribution_of_no_samples() -> None:
    assert distribution([None, None]) is None


def test_latencies_count_from_the_intended_start() -> None:
    record = answered(4, 3.0, 4.0, 6.0, intended=1.0, ended=7.0)

    assert record.time_to_first_token == 2.0
    assert record.gaps == [1.0, 2.0]
    assert record.end_to_end == 6.0
    # Four tokens came in three events: three intervals in the three seconds between them.
    assert record.time_per_output_token == 1.0


def test_an_answer_of_tokens_without_text_shows_at_its_end() -> None:
    record = answered(2, ended=7.0)

    assert (record.time_to_first_token, record.time_per_output_token) == (7.0, None)


def test_an_answer_without_tokens_has_no_first_one() -> None:
    assert answered(0, ended=7.0).time_to_first_token is None


def test_failures_are_counted_by_status_and_are_no_latency() -> None:
    full, gone = failed("RESOURCE_EXHAUSTED", "full"), failed("UNAVAILABLE", "gone")

    summary = summarize(run_of(full, answered(2, 1.0, 2.0, ended=3.0), gone, full))

    assert (summary.succeeded, summary.failed) == (1, 3)
    assert {name: each.count for name, each in summary.failures.items()} == {
        "RESOURCE_EXHAUSTED": 2,
        "UNAVAILABLE": 1,
    }
    assert summary.end_to_end_latency is not None
    assert summary.end_to_end_latency.count == 1


def test_rates_are_over_the_whole_run() -> None:
    summary = summarize(run_of(*[answered(20, 1.0, ended=2.0)] * 5, lasting=4.0))

    assert summary.output_tokens_per_second == 25.0
    assert summary.prompt_tokens_per_second == 12.5
    assert summary.requests_per_second == 1.25
    assert summary.cached_prompt_tokens == 25


@given(st.lists(st.lists(st.floats(0, 10), max_size=5), min_size=1, max_size=5), st.integers(1, 70))
def test_throughput_over_time_adds_up_to_all_tokens(arrivals: list[list[float]], bins: int) -> None:
    run = run_of(*[answered(7, *sorted(times), ended=10.0) for times in arrivals])

    rates = tokens_per_second(run, bins)

    assert sum(rates) * 10.0 / bins == pytest.approx(7 * len(arrivals))
