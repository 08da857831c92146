"""Draws from candidates, compared with the definition: sort all tokens, apply the rules."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.sampling.columns import DrawColumns
from model_service.engine.sampling.device.truncation import draw_truncated
from model_service.engine.sampling.host.truncation import (
    Columns,
    choose,
    draw,
    keep,
    most_probable,
)
from model_service.engine.sampling.philox import uniforms

VOCAB = 12
# Below, at and above what 64 and 512 blocks of 16 hold, and not multiples of a block.
VOCABS = 2, 12, 300, 1023, 1024, 1040, 1055, 3000, 8192, 9001, 20000


def truncation(top_k: int, min_p: float = 0.0, top_p: float = 1.0, uniform: float = 0.5) -> Columns:
    return DrawColumns(
        top_k=np.array([[top_k]]),
        min_p=np.array([[min_p]], dtype=np.float32),
        top_p=np.array([[top_p]], dtype=np.float32),
        uniform=np.array([[uniform]]),
    )


def stacked(rows: list[Columns]) -> Columns:
    columns = ([row.top_k, row.min_p, row.top_p, row.uniform] for row in rows)
    return DrawColumns(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def kept(probabilities: torch.Tensor, rules: Columns) -> set[int]:
    vocab = probabilities.shape[-1]
    candidates = most_probable(probabilities, vocab)
    weights, _ = keep(candidates, rules, vocab)
    return set(candidates.ids[weights > 0].tolist())


def metas_set(probabilities: torch.Tensor, top_p: float) -> set[int]:
    """The set that `sample_top_p` in Meta's llama/generation.py keeps, statement by statement."""
    probs_sort, probs_idx = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    probs_sum = torch.cumsum(probs_sort, dim=-1)
    mask = probs_sum - probs_sort > top_p
    probs_sort[mask] = 0.0
    return {int(i) for i, p in zip(probs_idx[0], probs_sort[0], strict=True) if p > 0}


def defined(probabilities: torch.Tensor, rules: Columns) -> torch.Tensor:
    """The weights [1, vocab] that sorting all tokens gives."""
    ordered, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    top_k, min_p, top_p = map(torch.from_numpy, (rules.top_k, rules.min_p, rules.top_p))
    left = (torch.arange(ordered.shape[-1]) < top_k) & (ordered >= min_p * ordered[:, :1])
    ordered = ordered.masked_fill(~left, 0.0)
    shares = ordered
    if top_k < ordered.shape[-1] or min_p > 0:
        shares = ordered / ordered.double().cumsum(dim=-1)[:, -1:].float()
    mass_before = torch.cumsum(shares, dim=-1) - shares
    ordered = ordered.masked_fill((mass_before > top_p) & (top_p < 1.0), 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, ordered)


@st.composite
def distributions(choose_from: st.DrawFn) -> torch.Tensor:
    """Probabilities [1, vocab]: flat, peaked, Zipf-like or random, with or without ties."""
    vocab = choose_from(st.sampled_from(VOCABS))
    generator = torch.Generator().manual_seed(choose_from(st.integers(0, 2**32)))
    logits = torch.randn(1, vocab, generator=generator)
    zipf = -torch.log(torch.randperm(vocab, generator=generator) + 1.0)
    logits = logits * choose_from(st.sampled_from((0.0, 1e-4, 1.0, 8.0)))
    logits += zipf * choose_from(st.sampled_from((0.0, 1.0, 2.5)))
    step = choose_from(st.sampled_from((0.0, 0.5, 2.0)))
    if step:
        logits = (logits / step).round() * step
    temperature = choose_from(st.sampled_from((1e-30, 0.1, 0.6, 1.0, 1.5, 1e6)))
    return torch.softmax(logits / temperature, dim=-1)


@st.composite
def rules_for(choose_from: st.DrawFn, probabilities: torch.Tensor) -> Columns:
    """Parameters, often right at the border of a token."""
    ordered = probabilities[0].sort(descending=True).values
    rank = choose_from(st.integers(0, min(len(ordered) - 1, 700)))
    border = min(1.0, float((ordered.cumsum(-1) - ordered)[rank]))
    any_share = st.floats(0, 1, width=32)
    vocab = len(ordered)
    return truncation(
        choose_from(st.one_of(st.just(vocab), st.integers(1, min(vocab, 700)))),
        choose_from(st.one_of(st.just(0.0), st.just(float(ordered[rank] / ordered[0])), any_share)),
        choose_from(st.one_of(st.sampled_from((0.0, 0.9, 0.95, 1.0)), st.just(border), any_share)),
        choose_from(st.one_of(st.just(0.0), st.just(1 - 2**-32), st.floats(0, 1 - 2**-32))),
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_candidates_give_the_draw_that_sorting_all_tokens_gives(data: st.DataObject) -> None:
    probabilities = data.draw(distributions())
    rules = [data.draw(rules_for(probabilities)) for _ in range(3)]
    weights = [defined(probabilities, rule) for rule in rules]
    expected = [
        int(draw(w, torch.from_numpy(r.uniform))) for w, r in zip(weights, rules, strict=True)
    ]
    assert choose(probabilities.expand(3, -1).contiguous(), stacked(rules)).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_device_draws_what_candidates_give_without_looking_at_them(data: st.DataObject) -> None:
    probabilities = data.draw(distributions()).expand(3, -1).contiguous()
    rules = stacked([data.draw(rules_for(probabilities)) for _ in range(3)])
    on_device = DrawColumns(
        *map(torch.from_numpy, (rules.top_k, rules.min_p, rules.top_p, rules.uniform))
    )
    drawn = draw_truncated(probabilities, on_device)
    assert drawn.tolist() == choose(probabilities, rules).tolist()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from((1, 4, 64, 512)))
def test_a_certain_row_keeps_exactly_the_defined_weights(data: st.DataObject, blocks: int) -> None:
    probabilities = data.draw(distributions())
    rules = data.draw(rules_for(probabilities))
    candidates = most_probable(probabilities, blocks)
    weights, certain = keep(candidates, rules, probabilities.shape[-1])
    if certain[0]:
        found = torch.zeros_like(probabilities)
        found[0, candidates.ids[0]] = torch.from_numpy(weights[0])
        assert torch.equal(found, defined(probabilities, rules))


@pytest.mark.parametrize(("top_p", "min_p"), [(0.9, 0.0), (1.0, 0.2), (0.0, 0.0)])
def test_a_peaked_row_is_certain_at_the_first_look(top_p: float, min_p: float) -> None:
    logits = torch.randn(1, 32000)
    logits[0, [3, 31000, 17]] += 20
    candidates = most_probable(torch.softmax(logits, dim=-1), 64)
    assert keep(candidates, truncation(32000, min_p, top_p), 32000)[1].all()


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60),
    top_p=st.one_of(st.floats(0, 1, exclude_max=True, width=32), st.just(0.0)),
)
def test_top_p_keeps_exactly_metas_set(logits: list[float], top_p: float) -> None:
    probabilities = torch.softmax(torch.tensor([logits]), dim=-1)
    assert kept(probabilities, truncation(len(logits), top_p=top_p)) == metas_set(
        probabilities, top_p
    )


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=60))
def test_top_p_of_one_keeps_every_token(logits: list[float]) -> None:
    probabilities = torch.softmax(torch.tensor([logits]), dim=-1)
    assert kept(probabilities, truncation(len(logits))) == set(range(len(logits)))


def test_top_p_of_zero_keeps_the_most_probable_token() -> None:
    assert kept(torch.tensor([[0.2, 0.5, 0.3]]), truncation(3, top_p=0.0)) == {1}


@given(st.permutations(range(VOCAB)), st.integers(1, VOCAB))
def test_top_k_keeps_the_k_most_probable(ranks: list[int], k: int) -> None:
    probabilities = torch.softmax(torch.tensor([ranks]).float(), dim=-1)
    left = kept(probabilities, truncation(k))
    assert {ranks[token] for token in left} == set(range(VOCAB - k, VOCAB))


def test_min_p_drops_what_is_less_probable_than_a_share_of_the_best() -> None:
    probabilities = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]])
    assert kept(probabilities, truncation(5, min_p=0.5)) == {1, 2}
    assert kept(probabilities, truncation(5, min_p=0.51)) == {1}
    assert kept(probabilities, truncation(5, min_p=0.0)) == {0, 1, 2, 3, 4}


def test_top_p_measures_mass_among_what_min_p_left() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]])
    assert kept(probabilities, truncation(5, top_p=0.6)) == {0, 1}
    assert kept(probabilities, truncation(5, min_p=0.3, top_p=0.6)) == {0}


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
