from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_service.engine.sampler import draw, keep_most_probable, sample, score
from model_service.engine.sequence import GenerationRequest, SamplingParams, Sequence
from model_service.engine.uniform import philox, uniforms

VOCAB = 12


def sequence(tokens: tuple[int, ...] = (1, 2, 3), offset: int = 0, **params: Any) -> Sequence:
    request = GenerationRequest(0, tokens, 8, SamplingParams(**params), offset=offset)
    return Sequence.from_request(request, context=64, arrival=0)


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]])


def metas_set(probabilities: torch.Tensor, top_p: float) -> set[int]:
    """What `sample_top_p` in Meta's llama/generation.py leaves, statement by statement."""
    probs_sort, probs_idx = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    probs_sum = torch.cumsum(probs_sort, dim=-1)
    mask = probs_sum - probs_sort > top_p
    probs_sort[mask] = 0.0
    return {int(i) for i, p in zip(probs_idx[0], probs_sort[0], strict=True) if p > 0}


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60),
    top_p=st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.just(0.0)),
)
def test_top_p_keeps_exactly_metas_set(logits: list[float], top_p: float) -> None:
    probabilities = torch.softmax(torch.tensor([logits]), dim=-1)
    kept = keep_most_probable(probabilities, column(len(logits)), column(top_p))
    assert set(kept[0].nonzero().flatten().tolist()) == metas_set(probabilities.clone(), top_p)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60))
def test_top_p_of_one_keeps_every_token(logits: list[float]) -> None:
    probabilities = torch.softmax(torch.tensor([logits]), dim=-1)
    kept = keep_most_probable(probabilities, column(len(logits)), column(1.0))
    assert torch.equal(kept, probabilities)


def test_top_p_of_zero_keeps_the_most_probable_token() -> None:
    kept = keep_most_probable(torch.tensor([[0.2, 0.5, 0.3]]), column(3), column(0.0))
    assert kept[0].nonzero().flatten().tolist() == [1]


@given(st.permutations(range(VOCAB)), st.integers(1, VOCAB))
def test_top_k_keeps_the_k_most_probable(ranks: list[int], k: int) -> None:
    probabilities = torch.softmax(torch.tensor([ranks]).float(), dim=-1)
    kept = keep_most_probable(probabilities, column(k), column(1.0))
    assert {ranks[i] for i in kept[0].nonzero().flatten()} == set(range(VOCAB - k, VOCAB))


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


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).expand(20000, 4)
    numbers = uniforms(np.arange(20000, dtype=np.uint64), np.full(20000, 5))
    counts = Counter(draw(weights, torch.from_numpy(numbers).unsqueeze(-1)).tolist())
    assert counts[1] == 0
    for token, share in ((0, 0.5), (2, 0.2), (3, 0.3)):
        assert counts[token] / 20000 == pytest.approx(share, abs=0.02)


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30).filter(any))
def test_a_draw_never_takes_a_token_without_weight(weights: list[float]) -> None:
    row = torch.tensor([weights])
    for uniform in (0.0, 0.5, 1 - 2**-32):
        token = int(draw(row, torch.tensor([[uniform]], dtype=torch.float64)))
        assert row[0, token] > 0


def test_each_row_has_its_own_settings() -> None:
    logits = torch.arange(VOCAB).float().expand(3, VOCAB)
    rows = [
        sequence(temperature=0.0),
        sequence(temperature=5.0, top_p=1.0, seed=3),
        sequence(temperature=5.0, top_k=1, seed=3),
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[:1], [row])[0] for row in rows]
    assert together[0] == together[2] == VOCAB - 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_among_unequal_logits(temperature: float) -> None:
    logits = torch.tensor([[-50.0, 90.0, 89.9999, 3.0]])
    assert sample(logits, [sequence(temperature=temperature, top_p=1.0, seed=9)]) == [1]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, -1.0]])
    assert sample(logits, [sequence((1, 0), temperature=0.0)]) == [1]
    assert sample(logits, [sequence((1, 0), temperature=0.0, repetition_penalty=1.5)]) == [2]


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 0.5]])
    prompt_only = sequence((1, 1, 3), temperature=0.0, presence_penalty=2.0)
    resumed = sequence((3, 1, 1), offset=2, temperature=0.0, presence_penalty=1.5)
    twice = sequence((3, 1, 1), offset=2, temperature=0.0, frequency_penalty=0.6)
    once = sequence((3, 2, 1), offset=1, temperature=0.0, frequency_penalty=0.6)
    assert sample(logits.expand(4, 4), [prompt_only, resumed, twice, once]) == [1, 2, 2, 1]


def test_logit_bias_moves_single_tokens() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    biased = sequence((1,), temperature=0.0, logit_bias={0: -100.0, 2: 5.0})
    assert sample(logits, [biased]) == [2]
    assert logits.tolist() == [[3.0, 2.0, 1.0]]


def test_scores_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    expected = torch.log_softmax(logits, dim=-1)[0].tolist()
    (entry,) = score(logits, [0], [2])
    assert entry.logprob == pytest.approx(expected[0])
    assert [token for token, _ in entry.top] == [1, 2]
    assert [value for _, value in entry.top] == pytest.approx([expected[1], expected[2]])
