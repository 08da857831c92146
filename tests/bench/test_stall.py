import pytest

from bench.engine.stall import NEAREST, over_bare_steps


def test_a_machine_that_slows_down_makes_no_stall() -> None:
    """Steps with prompt tokens take twice as long as others; later all take three times that."""
    fast = [(0, 1.0)] * 8 + [(13, 2.0), (13, 2.0), (0, 1.0)] * 8
    slow = [(tokens, 3 * seconds) for tokens, seconds in fast]
    ratios = over_bare_steps(fast + slow)
    settled = ratios[: len(fast) - NEAREST] + ratios[len(fast) + NEAREST :]
    assert set(settled) == {1.0, 2.0}


def test_one_strange_step_stands_out() -> None:
    steps = [(0, 1.0)] * 5 + [(13, 2.0), (0, 1.0), (13, 9.0), (0, 7.0), (13, 2.0)]
    assert max(over_bare_steps(steps)) == pytest.approx(9.0)
