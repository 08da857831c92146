"""The measurement that waits are estimated from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.throughput import ThroughputEstimator


def measured(rate: int, seconds: int, *, waiting: bool = True) -> ThroughputEstimator:
    """A estimator after so many seconds, with an answer of ten tokens."""
    estimator = ThroughputEstimator()
    for now in range(seconds + 1):
        estimator.record(rate, waiting=waiting, now=now)
    estimator.record_answer(10)
    return estimator


@given(st.integers(1, 10_000), st.integers(1, 100), st.integers(0, 100_000))
def test_steady_pace_is_what_was_measured(rate: int, seconds: int, tokens: int) -> None:
    assert measured(rate, seconds).seconds(tokens, seconds) == pytest.approx(tokens / rate)


def test_nothing_is_estimated_before_anybody_waited() -> None:
    assert measured(100, 60, waiting=False).seconds(10, 60) is None


def test_nothing_is_estimated_before_an_answer_ended() -> None:
    estimator = ThroughputEstimator()
    estimator.record(0, waiting=True, now=0)
    estimator.record(100, waiting=True, now=5)
    assert estimator.seconds(10, 5) is None


def test_replicas_that_stand_still_make_the_wait_longer() -> None:
    estimator = measured(100, 10)
    before, after = estimator.seconds(1000, 10), estimator.seconds(1000, 70)
    assert before is not None
    assert after is not None
    assert after > 4 * before


def test_the_last_seconds_count_most() -> None:
    estimator = measured(100, 60)
    for now in range(61, 101):
        estimator.record(10, waiting=True, now=now)
    assert estimator.seconds(150, 100) == pytest.approx(10, rel=0.1)


@given(st.lists(st.integers(0, 500), min_size=1), st.integers(1, 100))
def test_expected_answer_is_within_what_was_seen_and_asked(lengths: list[int], most: int) -> None:
    estimator = ThroughputEstimator()
    for each in lengths:
        estimator.record_answer(each)
    assert min([*lengths, most]) <= estimator.answer_tokens(most) <= most
