import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.summary import ratio, summarize

VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1)


@given(VALUES)
def test_median_lies_between_lowest_and_highest(values: list[float]) -> None:
    summary = summarize(values)
    assert summary.low <= summary.median <= summary.high
    assert summary.count == len(values)


@given(VALUES, st.floats(0.1, 10))
def test_ratio_to_a_scaled_copy_is_the_scale(values: list[float], scale: float) -> None:
    assert ratio([scale * value for value in values], values) == pytest.approx(scale)


def test_one_outlier_moves_no_median() -> None:
    assert summarize([1.0, 2.0, 3.0]).median == summarize([1.0, 2.0, 3000.0]).median


def test_nothing_is_not_summarized() -> None:
    with pytest.raises(ValueError, match="no measurements"):
        summarize([])
