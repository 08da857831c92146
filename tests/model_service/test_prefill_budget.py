from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model_service.engine.scheduling.prefill_budget import (
    CONTRAST_EVERY,
    FLOOR,
    WINDOW,
    PrefillBudget,
)

Seconds = Callable[[int, int], float]  # of a step with these decode rows and prompt tokens
SETTLED = 6 * WINDOW
ROWS = 32  # that decode on a recorded device


def linear(base: float, per_token: float) -> Seconds:
    return lambda _rows, tokens: base + per_token * tokens


def loaded(prefill_budget: PrefillBudget, seconds: Seconds, steps: int, rows: int = 8) -> list[int]:
    """Steps with more prompt tokens waiting than any budget; returns what each took."""
    taken = []
    for _ in range(steps):
        taken.append(prefill_budget.prompt_budget(rows))
        prefill_budget.record(rows, taken[-1], seconds(rows, taken[-1]))
    return taken


def usual(budgets: list[int]) -> list[int]:
    """Without the steps that take none on purpose."""
    return [tokens for tokens in budgets if tokens]


def test_without_streams_a_step_takes_all_it_can() -> None:
    prefill_budget = PrefillBudget(2.0, 16, 512)
    loaded(prefill_budget, linear(0.01, 0.01), SETTLED)
    assert prefill_budget.prompt_budget(0) == 512


@given(
    stall=st.floats(1.1, 5.0),
    base=st.floats(1e-4, 1.0),
    affordable=st.integers(80, 400),  # prompt tokens that take as long as decode alone
)
def test_steps_stay_below_the_stall_and_use_most_of_it(
    stall: float, base: float, affordable: int
) -> None:
    prefill_budget = PrefillBudget(stall, 4, 4096)
    seconds = linear(base, base / affordable)
    late = loaded(prefill_budget, seconds, SETTLED)[-2 * WINDOW :]
    assert max(seconds(8, tokens) for tokens in late) <= stall * base * 1.01
    assert min(usual(late)) >= (stall - 1) * affordable * 0.9 - 1


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 600), st.floats(0, 1e3)), max_size=60),
    st.integers(1, 64),
    st.integers(1, 512),
)
def test_a_budget_is_never_below_the_floor_nor_above_the_ceiling(
    steps: list[tuple[int, int, float]], first: int, ceiling: int
) -> None:
    prefill_budget = PrefillBudget(2.0, first, ceiling)
    for rows, tokens, seconds in steps:
        prefill_budget.record(rows, tokens, seconds)
        for decoding in (0, 1, rows, 300):
            budget = prefill_budget.prompt_budget(decoding)
            assert min(FLOOR, ceiling) <= budget <= ceiling or (decoding and not budget)


@given(st.floats(1.1, 5.0), st.floats(1e-4, 1.0), st.floats(1e-6, 1.0), st.randoms())
def test_prompts_get_on_in_all_steps_but_every_ninth(
    stall: float, base: float, per_token: float, dice: Random
) -> None:
    prefill_budget = PrefillBudget(stall, 4, 4096)
    noisy = linear(base, per_token)
    taken = loaded(prefill_budget, lambda *step: noisy(*step) * dice.uniform(0.5, 2), SETTLED)
    assert not any(not before and not after for before, after in pairwise(taken))
    assert taken.count(0) <= SETTLED // CONTRAST_EVERY


@pytest.mark.parametrize("seed", range(5))
def test_noise_among_steps_of_like_size_does_not_make_the_slope(seed: int) -> None:
    """Each token of a long prompt costs more than the last; the machine is noisy."""
    dice, prefill_budget = Random(seed), PrefillBudget(2.0, 16, 512)
    done, gaps = 0, []
    while done < 4000:
        context, tokens = done / 4000, prefill_budget.prompt_budget(8)
        step = 1 + tokens * (0.04 + 0.08 * context)
        prefill_budget.record(8, tokens, step * dice.lognormvariate(0, 0.12))
        gaps.append(step)
        done += tokens
    assert max(gaps[WINDOW:]) < 2.7


@pytest.mark.parametrize("outlier", [0.0, 100.0])
def test_one_outlier_changes_next_to_nothing(outlier: float) -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    seconds = linear(0.01, 0.0001)
    loaded(prefill_budget, seconds, SETTLED)
    prefill_budget.record(8, 100, outlier)
    assert all(85 <= tokens <= 115 for tokens in usual(loaded(prefill_budget, seconds, WINDOW)))


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_machine_that_changes_its_speed_keeps_its_budget(factor: float) -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    loaded(prefill_budget, linear(0.01, 0.0001), SETTLED)
    late = loaded(prefill_budget, linear(0.01 * factor, 0.0001 * factor), SETTLED)[-WINDOW:]
    assert all(90 <= tokens <= 100 for tokens in usual(late))


@pytest.mark.parametrize(("before", "after"), [(400, 50), (50, 400)])
def test_prompt_tokens_that_change_their_cost_change_the_budget(before: int, after: int) -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    loaded(prefill_budget, linear(0.01, 0.01 / before), SETTLED)
    late = loaded(prefill_budget, linear(0.01, 0.01 / after), SETTLED)[-WINDOW:]
    assert all(0.9 * after <= tokens <= after for tokens in usual(late))


def test_prompts_may_take_less_than_a_block_where_they_cost_much() -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    late = loaded(prefill_budget, linear(0.1, 0.018), SETTLED)[-WINDOW:]
    assert max(late) == 5
    assert late.count(5) >= WINDOW * 3 // 4


def test_a_budget_at_the_floor_rises_again_when_prompts_get_cheap() -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    assert max(usual(loaded(prefill_budget, linear(0.01, 0.01), SETTLED)[-WINDOW:])) <= FLOOR
    late = loaded(prefill_budget, linear(0.01, 0.0001), SETTLED)[-WINDOW:]
    assert all(90 <= tokens <= 100 for tokens in usual(late))


def test_decode_alone_keeps_what_was_learned_of_prompts() -> None:
    prefill_budget = PrefillBudget(2.0, 16, 4096)
    seconds = linear(0.01, 0.0001)
    loaded(prefill_budget, seconds, SETTLED)
    for _ in range(1000):
        prefill_budget.record(8, 0, 0.01)
    assert 90 <= prefill_budget.prompt_budget(8) <= 100


@dataclass
class RecordedDevice:
    """A GPU that replays decode-only steps, other small ones in pieces, and else single kernels.

    Times are in seconds. A step is timed on the device, from the end of the work before it, or from
    its launch, to its own end. With lookahead it is launched before the last one is read.
    """

    decode: float  # device, without prompt tokens
    per_token: float
    launch: float  # host, a step with prompt tokens, kernel by kernel
    lookahead: bool
    in_pieces: float = 0.0  # host, the same in pieces
    recorded_tokens: int = 0  # most tokens of a step in pieces
    preparation: float = 0.001  # host, before a step's first kernel

    def run(self, budget: PrefillBudget, steps: int) -> list[tuple[int, float]]:
        """Prompt tokens and seconds of steps, with more prompts waiting than any takes."""
        host = device = 0.0
        launched: list[tuple[int, float, float]] = []
        ends: list[float] = []
        for _ in range(steps):
            tokens = budget.prompt_budget(ROWS)
            begin = max(host, device)
            launch = self.preparation
            if tokens:
                recorded = ROWS + tokens <= self.recorded_tokens
                launch += self.in_pieces if recorded else self.launch
            work = self.decode + self.per_token * tokens
            # Kernels run as they are launched.
            device = max(max(host + self.preparation, device) + work, host + launch)
            host += launch
            launched.append((tokens, device - begin, launch))
            ends.append(device)
            read = len(launched) - 1 - self.lookahead
            if read >= 0:
                host = max(host, ends[read])
                budget.record(ROWS, *launched[read])
        return [(tokens, seconds) for tokens, seconds, _ in launched]


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize(
    ("decode", "launch"),
    [(0.005, 0.005), (0.005, 0.007), (0.005, 0.012), (0.0022, 0.005), (0.0022, 0.007)],
)
def test_launches_that_take_longer_than_graphs_neither_stall_streams_nor_prompts(
    decode: float, launch: float, lookahead: bool
) -> None:
    device = RecordedDevice(decode, 18e-6, launch, lookahead)
    stall = 1.7
    steps = device.run(PrefillBudget(stall, 16, 2048, recorded_tokens=0), 600)[300:]
    longest = max(seconds for _, seconds in steps)
    # A launch of 8 ms alone is more than three of int4's steps.
    alone = decode + device.preparation
    assert longest <= 1.01 * max(stall * alone, 1.07 * (launch + device.preparation))
    assert longest <= 2 * stall * alone
    per_second = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    assert per_second > 20_000


@given(
    decode=st.floats(0.002, 0.02),
    per_token=st.floats(5e-6, 1e-4),
    launch=st.floats(0.001, 0.02),
    lookahead=st.booleans(),
    stall=st.floats(1.2, 4.0),
)
def test_recorded_steps_keep_the_stall_or_take_what_a_launch_hides(
    decode: float, per_token: float, launch: float, lookahead: bool, stall: float
) -> None:
    device = RecordedDevice(decode, per_token, launch, lookahead)
    steps = device.run(PrefillBudget(stall, 16, 4096, recorded_tokens=0), 900)[600:]
    alone, launched = decode + device.preparation, launch + device.preparation
    fewest = max(launched, alone + FLOOR * per_token)
    bound = max(stall * alone, 1.07 * launched, fewest) + per_token
    assert max(seconds for _, seconds in steps) <= 1.01 * bound
    free = (max(stall * decode, launch) - decode) / per_token
    usual_tokens = sorted(tokens for tokens, _ in steps)[len(steps) // 2]
    assert usual_tokens >= min(0.75 * free, 4096) - 2


# Two budgets in turn are no contrast: without decode-only steps the base is never measured again.
@example(
    decode=0.002,
    per_token=9.4e-5,
    launch=0.0156,
    in_pieces=0.0005,
    lookahead=True,
    stall=1.2,
)
@given(
    decode=st.floats(0.002, 0.02),
    per_token=st.floats(1e-6, 1e-4),
    launch=st.floats(0.003, 0.02),
    in_pieces=st.floats(0.0005, 0.003),
    lookahead=st.booleans(),
    stall=st.floats(1.2, 4.0),
)
def test_steps_in_pieces_keep_the_stall_whatever_other_launches_take(
    decode: float,
    per_token: float,
    launch: float,
    in_pieces: float,
    lookahead: bool,
    stall: float,
) -> None:
    device = RecordedDevice(
        decode, per_token, launch, lookahead, in_pieces=in_pieces, recorded_tokens=512
    )
    steps = device.run(PrefillBudget(stall, 16, 4096, 512), 900)[600:]
    alone, launched = decode + device.preparation, in_pieces + device.preparation
    fewest = max(launched, alone + FLOOR * per_token)
    bound = max(stall * alone, 1.07 * launched, fewest) + per_token
    assert max(seconds for _, seconds in steps) <= 1.01 * bound
    hides = max(stall * decode, in_pieces)
    free = min((hides - decode) / per_token, 512 - ROWS)
    usual_tokens = sorted(tokens for tokens, _ in steps)[len(steps) // 2]
    assert usual_tokens >= 0.75 * free - 2
