import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.baselines.rounds import Case, parse_case, rows, schedule

NAMES = st.lists(st.text("abc", min_size=1), min_size=1, max_size=6, unique=True)
CASES = st.lists(
    st.builds(Case, st.sampled_from(["prefill", "decode"]), st.integers(1, 512)),
    min_size=1,
    max_size=3,
    unique=True,
)


@given(NAMES, CASES, st.integers(1, 4), st.integers())
def test_each_round_asks_every_contender_every_case_once(
    names: list[str], cases: list[Case], rounds: int, seed: int
) -> None:
    turns = list(schedule(names, cases, rounds, seed))
    for number in range(rounds):
        asked = [(turn.case, turn.contender) for turn in turns if turn.round == number]
        assert sorted(asked, key=str) == sorted(itertools.product(cases, names), key=str)
    assert [turn.round for turn in turns] == sorted(turn.round for turn in turns)


@given(NAMES, CASES, st.integers(1, 4), st.integers())
def test_contenders_of_a_round_and_case_get_the_same_prompts(
    names: list[str], cases: list[Case], rounds: int, seed: int
) -> None:
    seeds = {(turn.round, turn.case, turn.seed) for turn in schedule(names, cases, rounds, seed)}
    assert len(seeds) == rounds * len(cases)


def test_order_of_contenders_changes_from_round_to_round() -> None:
    turns = list(schedule("abcdefgh", [Case("decode", 1)], 4, seed=1))
    orders = {tuple(t.contender for t in turns if t.round == number) for number in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("name", ["decode", "decode-0", "decode-x", "train-1", ""])
def test_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name a case as"):
        parse_case(name)


def test_rate_counts_all_sequences_of_a_step() -> None:
    assert parse_case("prefill-512").rate([2.0]) == 256
    assert parse_case("decode-8").rate([0.5, 1.5]) == 8


def test_ratio_is_of_medians_and_missing_without_reference() -> None:
    rates = {("decode-1", "a"): [1.0, 2.0, 30.0], ("decode-1", "b"): [8.0, 6.0, 9.0]}
    found = rows(rates, {"a": "a", "b": "a"})
    assert [row.values["over_chasqui"] for row in found] == [1.0, 4.0]
    assert [row.values["tokens_per_s_high"] for row in found] == [30.0, 9.0]
    assert [row.settings["contender"] for row in rows(rates, {"b": "a", "a": "a"})] == ["b", "a"]
    assert rows(rates, {"a": "c", "b": "c"})[0].values["over_chasqui"] is None
