"""The measurement that waits are estimated from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.throughput import ThroughputEstimator


def measured(rate: int, seconds: int, *, waiting: bool = True) -> ThroughputEstimator:
    """A pace after so many seconds, with an answer of ten tokens."""
    pace = ThroughputEstimator()
    for now in range(seconds + 1):
        pace.record(rate, waiting=waiting, now=now)
    pace.record_answer(10)
    return pace


@given(st.integers(1, 10_000), st.integers(1, 100), st.integers(0, 100_000))
def test_steady_pace_is_what_was_measured(rate: int, seconds: int, tokens: int) -> None:
    assert measured(rate, seconds).seconds(tokens, seconds) == pytest.approx(tokens / rate)


def test_nothing_is_estimated_before_anybody_waited() -> None:
    assert measured(100, 60, waiting=False).seconds(10, 60) is None


def test_nothing_is_estimated_before_an_answer_ended() -> None:
    pace = ThroughputEstimator()
    pace.record(0, waiting=True, now=0)
    pace.record(100, waiting=True, now=5)
    assert pace.seconds(10, 5) is None


def test_replicas_that_stand_still_make_the_wait_longer() -> None:
    pace = measured(100, 10)
    before, after = pace.seconds(1000, 10), pace.seconds(1000, 70)
    assert before is not None
    assert after is not None
    assert after > 4 * before


def test_the_last_seconds_count_most() -> None:
    pace = measured(100, 60)
    for now in range(61, 101):
        pace.record(10, waiting=True, now=now)
    assert pace.seconds(150, 100) == pytest.approx(10, rel=0.1)


@given(st.lists(st.integers(0, 500), min_size=1), st.integers(1, 100))
def test_expected_answer_is_within_what_was_seen_and_asked(lengths: list[int], most: int) -> None:
    pace = ThroughputEstimator()
    for each in lengths:
        pace.record_answer(each)
    assert min([*lengths, most]) <= pace.answer_tokens(most) <= most
