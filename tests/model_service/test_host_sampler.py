import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_service.engine.sampling.host.logprobs import score
from model_service.engine.sampling.host.penalties import SamplingRow, apply_penalties
from model_service.engine.sampling.host.sampler import finite_rows, sample
from model_service.engine.sampling.philox import philox, uniforms
from model_service.engine.sequence import SamplingParams

VOCAB = 12


def row(
    tokens: tuple[int, ...] = (1, 2, 3),
    answer: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    **params: Any,
) -> SamplingRow:
    """A row whose last `answer` tokens are the answer's."""
    return SamplingRow(SamplingParams(**params), tokens, len(tokens) - answer, stop_ids)


def test_philox_gives_the_published_numbers() -> None:
    """Known answers of Random123, kat_vectors, philox4x32 10."""
    words = [np.array([value], dtype=np.uint64) for value in (0, 0xFFFFFFFF)]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    c0, c1, c2, c3, k0, k1 = (np.array([value], dtype=np.uint64) for value in pi)
    zero, ones = words
    assert philox((zero,) * 4, (zero,) * 2)[0] == 0x6627E8D5
    assert philox((ones,) * 4, (ones,) * 2)[0] == 0x408F276D
    assert philox((c0, c1, c2, c3), (k0, k1))[0] == 0xD16CFE09


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    seeds = np.array([7, 7, 8, 2**64 - 1], dtype=np.uint64)
    positions = np.array([1, 2, 1, 1])
    together = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_each_row_has_its_own_settings() -> None:
    logits = torch.arange(VOCAB).float().expand(5, VOCAB)
    rows = [
        row(temperature=0.0),
        row(temperature=5.0, top_p=1.0, seed=3),
        row(temperature=5.0, top_k=1, seed=3),
        row(temperature=5.0, top_p=1.0, seed=3, logit_bias={4: 100.0}),
        row(temperature=5.0, min_p=1.0, seed=4),
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[:1], [one])[0] for one in rows]
    assert together[0] == together[2] == together[4] == VOCAB - 1
    assert together[3] == 4


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_among_unequal_logits(temperature: float) -> None:
    logits = torch.tensor([[-50.0, 90.0, 89.9999, 3.0]])
    assert sample(logits, [row(temperature=temperature, top_p=1.0, seed=9)]) == [1]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, -1.0]])
    assert sample(logits, [row((1, 0), temperature=0.0)]) == [1]
    assert sample(logits, [row((1, 0), temperature=0.0, repetition_penalty=1.5)]) == [2]


def test_a_stop_id_that_ends_earlier_turns_is_not_penalized() -> None:
    logits = torch.tensor([[1.0, 0.9, -0.5]])
    penalties: Any = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    penalized = row((0, 1, 0), answer=2, temperature=0.0, **penalties, logit_bias={0: 0.5})
    exempt = dataclasses.replace(penalized, stop_ids=frozenset([0]))
    assert apply_penalties(logits, [exempt])[0, 0].item() == 1.5
    assert sample(logits.repeat(2, 1), [penalized, exempt]) == [2, 0]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 0.5]])
    prompt_only = row((1, 1, 3), temperature=0.0, presence_penalty=2.0)
    resumed = row((3, 1, 1), answer=2, temperature=0.0, presence_penalty=1.5)
    twice = row((3, 1, 1), answer=2, temperature=0.0, frequency_penalty=0.6)
    once = row((3, 2, 1), answer=1, temperature=0.0, frequency_penalty=0.6)
    assert sample(logits.expand(4, 4), [prompt_only, resumed, twice, once]) == [1, 2, 2, 1]


def test_logit_bias_moves_single_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    biased = row((1,), temperature=0.0, logit_bias={0: -100.0, 2: 5.0})
    assert sample(logits, [biased]) == [2]
    assert logits.tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0, 100.0])
def test_answer_that_is_too_short_cannot_end(temperature: float) -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0]])
    settings: Any = {"temperature": temperature, "logit_bias": {1: 100.0}, "min_gen_len": 2}
    short = row((1, 2), answer=1, stop_ids=frozenset([1]), **settings)
    long_enough = row((1, 2, 2), answer=2, stop_ids=frozenset([1]), **settings)
    assert sample(logits, [short]) != [1]
    assert sample(logits, [long_enough]) == [1]
    assert logits.tolist() == [[0.0, 50.0, 1.0]]


def test_scores_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    expected = torch.log_softmax(logits, dim=-1)[0].tolist()
    (entry,) = score(logits, [0], [2], [()])
    assert entry.logprob == pytest.approx(expected[0])
    assert [token for token, _ in entry.top] == [1, 2]
    assert [value for _, value in entry.top] == pytest.approx([expected[1], expected[2]])


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(0, 20))
def test_scores_equal_log_softmax(seed: int, rows: int, count: int) -> None:
    logits = torch.randn(rows, 700, generator=torch.Generator().manual_seed(seed)) * 4
    expected = torch.log_softmax(logits, dim=-1)
    targets = [(7 * index) % 700 for index in range(rows)]
    requested = [tuple(range(index % 4)) for index in range(rows)]
    entries = score(logits, targets, [count] * rows, requested)
    best = expected.topk(max(count, 1)).values[:, :count]
    assert [entry.logprob for entry in entries] == expected[range(rows), targets].tolist()
    for index, entry in enumerate(entries):
        assert [value for _, value in entry.top] == best[index].tolist()
        assert [expected[index, token] for token, _ in entry.top] == best[index].tolist()
        assert entry.requested == tuple(expected[index, : index % 4].tolist())
        assert expected[index].sort(descending=True).values[entry.rank - 1] == entry.logprob


def test_each_scored_row_names_as_many_alternatives_as_it_asked_for() -> None:
    entries = score(torch.randn(40, 900), [3] * 40, [i % 3 for i in range(40)], [()] * 40)
    assert [len(entry.top) for entry in entries] == [index % 3 for index in range(40)]


def test_an_equal_logit_with_a_lower_id_wins_when_greedy() -> None:
    assert sample(torch.tensor([[0.0, 5.0, 1.0, 5.0]]), [row(temperature=0.0)]) == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5000, 31999])
def test_only_the_row_with_a_bad_logit_is_not_finite(bad: float, place: int) -> None:
    logits = torch.randn(3, 32000)
    logits[1, place] = bad
    assert finite_rows(logits) == [True, False, True]


def test_large_finite_logits_are_finite_though_their_sum_is_not() -> None:
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, largest, -largest], [1.0, 2.0, 3.0], [largest, math.inf, 0.0]])
    assert finite_rows(logits) == [True, True, False]


def test_numbers_beyond_float32_do_not_break_the_draw() -> None:
    logits = torch.tensor([[1e30, -1e30, 2.0, -1e30]])
    assert sample(logits, [row((0, 1), temperature=1.0, repetition_penalty=1e-30)]) == [0]
    assert sample(logits, [row((0, 1), temperature=1e-38)]) == [0]


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=5))
def test_penalties_are_those_of_counting_each_token(answers: list[list[int]]) -> None:
    logits = torch.randn(len(answers), 31)
    params: Any = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    rows = [row((7, *answer), len(answer), **params) for answer in answers]
    adjusted = apply_penalties(logits, rows)
    for index, answer in enumerate(answers):
        for token in range(31):
            logit, count = logits[index, token].item(), answer.count(token)
            if count or token == 7:
                logit = logit / 1.3 if logit > 0 else logit * 1.3
            expected = logit - 0.3 * count - 0.4 * (count > 0)
            assert adjusted[index, token].item() == pytest.approx(expected, abs=1e-5)
