"""Distributions of lengths: what may be written, and that draws follow it."""

from random import Random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.loadtest.lengths import Constant, LogNormal, Uniform, parse

tokens = st.integers(1, 10_000)


@given(tokens, st.randoms(use_true_random=False))
def test_a_constant_is_drawn_as_written(length: int, random: Random) -> None:
    assert parse(f"{length}").draw(random) == length


@given(tokens, tokens, st.randoms(use_true_random=False))
def test_a_uniform_length_stays_within_its_bounds(one: int, other: int, random: Random) -> None:
    low, high = sorted((one, other))

    assert low <= parse(f"uniform:{low}-{high}").draw(random) <= high


def test_a_uniform_length_reaches_both_bounds() -> None:
    random = Random(0)

    assert {Uniform(3, 6).draw(random) for _ in range(200)} == {3, 4, 5, 6}


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.5])
def test_half_of_the_log_normal_lengths_are_below_the_median(sigma: float) -> None:
    lengths, random = LogNormal(200, sigma), Random(0)

    assert median(lengths.draw(random) for _ in range(4000)) == pytest.approx(200, rel=0.05)


@given(
    st.builds(Constant, tokens)
    | st.builds(lambda low, more: Uniform(low, low + more), tokens, tokens)
    | st.builds(LogNormal, tokens.map(float), st.sampled_from([0.0, 0.25, 1.5]))
)
def test_a_distribution_reads_back_as_it_is_written(
    lengths: Constant | Uniform | LogNormal,
) -> None:
    assert parse(str(lengths)) == lengths


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must be 128, uniform:"),
        ("-1", "must be 128, uniform:"),
        ("0", "at least 1"),
        ("uniform:0-3", "at least 1"),
        ("uniform:9-3", "9 is above 3"),
        ("lognormal:0.5,1", "at least 1"),
        ("lognormal:0.99999999,1", "at least 1 token, not 0.99999999"),
        ("lognormal:100,5.0000001", "sigma must be at most 5, not 5.0000001"),
        ("lognormal:100,7", "sigma must be at most 5"),
        ("normal:100,7", "must be 128, uniform:"),
    ],
)
def test_what_is_no_distribution_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)
