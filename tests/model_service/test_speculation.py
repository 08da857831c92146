from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_service.engine.drafting.ngram_drafter import NGRAM, NgramDrafter
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.speculation.drafters import Source
from model_service.engine.scheduling.speculation.row_costs import FORGET_AFTER, WINDOW
from model_service.engine.scheduling.speculation.speculation import (
    IDLE_STEPS,
    LOOK_EVERY,
    PLAIN_EVERY,
    Speculation,
)
from model_service.engine.sequence import GenerationRequest, SamplingParams, Sequence

CONTEXT = 256


def make_sequence(tokens: list[int]) -> Sequence:
    return Sequence.from_request(GenerationRequest(0, tuple(tokens), 100), 1000, 0)


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    later=st.lists(st.integers(0, 2), max_size=20),
    most=st.integers(1, 9),
)
def test_draft_is_what_last_followed_the_last_tokens(
    text: list[int], later: list[int], most: int
) -> None:
    drafter, sequence = NgramDrafter(), make_sequence(text)
    drafter.propose(sequence, most)
    sequence.tokens += later
    tokens = sequence.tokens
    begins = [
        end for end in range(NGRAM, len(tokens)) if tokens[end - NGRAM : end] == tokens[-NGRAM:]
    ]
    draft = drafter.propose(sequence, most)
    if not begins:
        assert draft == []
        return
    following = tokens[begins[-1] :]
    assert draft == [following[i % len(following)] for i in range(most)]


def speculation_at(cost: float) -> Speculation:
    """One whose pace has seen that a further token costs `cost` steps."""
    prefill_budget = PrefillBudget(2.0, 1, 1000)
    for tokens in range(20):
        prefill_budget.record(1, tokens, 1 + cost * tokens)
    return Speculation(NgramDrafter(), prefill_budget, most=8)


def propose(speculation: Speculation, sequence: Sequence) -> list[int]:
    """The drafts for a step in which the sequence decodes alone."""
    return speculation.propose({sequence: 100}, busy=False).get(sequence, [])


def test_a_sequence_that_repeats_is_trusted_more_and_more() -> None:
    speculation, sequence = speculation_at(0.1), make_sequence([1, 2, 3, 4] * 3)
    lengths = []
    for _ in range(8):
        drafts = propose(speculation, sequence)
        made = [(sequence.tokens[-1] + i) % 4 + 1 for i in range(len(drafts) + 1)]
        speculation.learn(sequence, drafts, made)
        sequence.tokens += made
        lengths.append(len(drafts))
    assert lengths[0] >= 1
    assert lengths[-1] == 8
    assert speculation.counts[Source.NGRAM] == (sum(lengths), sum(lengths))


def test_wrong_guesses_end_and_return_once_they_would_be_right() -> None:
    speculation, sequence = speculation_at(0.3), make_sequence([1, 2, 3, 4, 1, 2, 3])
    for _ in range(8):
        speculation.learn(sequence, propose(speculation, sequence), [9])
    assert propose(speculation, sequence) == []
    for _ in range(8):
        speculation.learn(sequence, [], [4])
        assert len(propose(speculation, sequence)) <= 8
    assert propose(speculation, sequence)[:1] == [4]


def test_nothing_is_drafted_where_a_row_costs_as_much_as_it_makes() -> None:
    sequence = make_sequence([1, 2, 3, 4] * 3)
    assert propose(speculation_at(1.0), sequence) == []
    assert propose(speculation_at(0.01), sequence) != []


def test_checking_a_draft_may_cost_more_than_a_prompt_token() -> None:
    speculation, sequence = speculation_at(0.01), make_sequence([1, 2, 3, 4] * 3)
    assert len(propose(speculation, sequence)) > 1
    for _ in range(WINDOW):
        speculation.checked(1, drafted=2, seconds=1 + 2 * 0.6)
    assert propose(speculation, sequence) == []  # half are expected to be right


def test_a_cost_that_was_measured_too_high_is_forgotten() -> None:
    speculation, sequence = speculation_at(0.01), make_sequence([1, 2, 3, 4] * 3)
    for _ in range(WINDOW):
        speculation.checked(1, drafted=2, seconds=100.0)
    considered = WINDOW * FORGET_AFTER
    steps = range(LOOK_EVERY * (considered + IDLE_STEPS))
    assert any(propose(speculation, sequence) for _ in steps)


def test_a_step_without_drafts_is_measured_from_time_to_time() -> None:
    speculation, sequence = speculation_at(0.01), make_sequence([1, 2, 3, 4] * 3)
    made = [bool(propose(speculation, sequence)) for _ in range(2 * PLAIN_EVERY)]
    assert made.count(False) == 2


@given(repeats_from=st.integers(0, 200))
def test_a_repetition_is_drafted_soon_after_it_begins(repeats_from: int) -> None:
    speculation, sequence = speculation_at(0.1), make_sequence([1000, 1001, 1002])
    for token in range(repeats_from):
        assert propose(speculation, sequence) == []
        sequence.tokens.append(token)
    sequence.tokens += [1, 2, 3, 4] * 2
    assert any(propose(speculation, sequence) for _ in range(LOOK_EVERY))


def repeating(length: int) -> tuple[int, ...]:
    return tuple(7 + i % 5 for i in range(length))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_drafts_change_no_token(make_engine: Any, run: Any, temperature: float) -> None:
    requests = [
        GenerationRequest(
            seed,
            repeating(10 + seed % 23),
            40,
            SamplingParams(
                temperature, top_p=0.95, seed=seed, repetition_penalty=1.1 if seed % 3 else 1.0
            ),
            stop_ids=frozenset([2, 50]),
            logprobs=seed % 2 == 0,
        )
        for seed in range(70)
    ]
    without = run(make_engine(draft_tokens=0), requests)
    engine = make_engine(draft_tokens=8)
    drafted = run(engine, requests)
    assert {seed: answer.ids for seed, answer in drafted.items()} == {
        seed: answer.ids for seed, answer in without.items()
    }
    for seed, answer in drafted.items():
        assert answer.logprobs == pytest.approx(without[seed].logprobs, abs=1e-4)
        assert answer.finish_reason == without[seed].finish_reason
    assert engine.load().accepted_tokens <= engine.load().drafted_tokens
    assert engine.load().drafted_tokens > 0


def test_each_accepted_draft_saves_a_step(make_engine: Any, run: Any, cases: Any) -> None:
    prompt = tuple(cases("mha")[0]["prompt_ids"])
    request = GenerationRequest(0, prompt, 100, SamplingParams(temperature=0.0))
    engine = make_engine("mha-mp1")
    run(engine, [request])
    load = engine.load()
    assert load.accepted_tokens > 0
    assert load.steps + load.accepted_tokens == load.completion_tokens == 100
