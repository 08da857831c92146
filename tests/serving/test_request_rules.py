"""The table of rules: what is inside each range, and that what an error prints is outside of it."""

import ctypes
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.numbers import format_apart, format_float32
from serving.request_rules import (
    NUMBER_RULES,
    FloatRule,
    IntegerRule,
    number_violations,
)

FLOATS = {name: rule for name, rule in NUMBER_RULES.items() if isinstance(rule, FloatRule)}
INTEGERS = {name: rule for name, rule in NUMBER_RULES.items() if isinstance(rule, IntegerRule)}

# Floats of 64 bits, among them many next to a limit of some rule.
numbers = st.floats() | st.builds(
    lambda limit, steps: limit + steps * 2.0**-30,
    st.sampled_from([-100, -2, 0, 1, 2, 10, 100]),
    st.integers(-(2**12), 2**12),
)


@pytest.mark.parametrize("name", FLOATS)
@given(value=numbers)
def test_the_printed_number_breaks_the_rule_that_is_printed_with_it(
    name: str, value: float
) -> None:
    rule = FLOATS[name]
    if problem := rule.problem(value):
        limits, printed = problem.removeprefix("must be ").split(", not ")
        read = float(printed)
        assert limits == str(rule)
        assert not (rule.low <= read <= rule.high) or (rule.above_low and read == rule.low)
        assert rule.problem(read) == problem


@pytest.mark.parametrize("name", FLOATS)
@given(value=numbers)
def test_a_number_is_judged_as_the_contracts_field_holds_it(name: str, value: float) -> None:
    rule, held = FLOATS[name], ctypes.c_float(value).value
    inside = not math.isnan(held) and rule.low <= held <= rule.high
    assert (rule.problem(value) is None) is (inside and not (rule.above_low and held == rule.low))


@given(value=st.floats(width=32, allow_nan=False))
def test_a_float_is_printed_so_that_it_reads_as_itself(value: float) -> None:
    assert ctypes.c_float(float(format_float32(value))).value == value


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0.1, "0.1"),
        (1.0000001, "1.0000001"),
        (-0.0, "-0"),
        (100, "100"),
        (1e20, "1e+20"),
        (1e-45, "1e-45"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_the_shortest_form_of_a_number_is_printed(value: float, printed: str) -> None:
    assert format_float32(ctypes.c_float(value).value) == printed


@given(one=st.floats(0, 2**50), other=st.floats(0, 2**50))
def test_numbers_that_are_compared_are_printed_so_that_they_differ(
    one: float, other: float
) -> None:
    texts = format_apart(one, other)
    assert (float(texts[0]) < float(texts[1])) is (one < other)
    assert (texts[0] == texts[1]) is (one == other)


@pytest.mark.parametrize("value", [None, "0.5", b"1", [1], object, math, 1j])
def test_what_is_no_number_is_refused_for_every_field(value: object) -> None:
    broken = number_violations(dict.fromkeys(NUMBER_RULES, value), "sampling.")
    assert {each.field for each in broken} == {f"sampling.{name}" for name in NUMBER_RULES}
    assert all(each.description.startswith("must be a") for each in broken)


@pytest.mark.parametrize("value", [True, Fraction(1, 2), 1])
def test_whatever_python_takes_as_a_number_is_one(value: Any) -> None:
    assert FLOATS["top_p"].problem(value) is None


@pytest.mark.parametrize("name", INTEGERS)
@given(value=st.integers() | st.integers(-2, 2))
def test_integers_outside_of_their_range_are_refused(name: str, value: int) -> None:
    rule = INTEGERS[name]
    assert (rule.problem(value) is None) is (rule.low <= value <= 2**32 - 1)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_integers_beyond_all_floats_are_refused(value: int) -> None:
    assert "inf" in (FLOATS["temperature"].problem(value) or "")
