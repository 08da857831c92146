"""Arithmetic of the exports, against our own network's rotation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.baselines.export.layout import (
    gguf_name,
    halves_from_pairs,
    hf_name,
    hf_weight,
    pairs_from_halves,
)
from bench.shapes import SHAPES
from model_service.model.operations import apply_rotary, rotary_frequencies

HEADS, HEAD_DIM, DIM = 4, 8, 16


def rotate_halves(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """As transformers' apply_rotary_pos_emb: x [tokens, heads, head_dim]."""
    cos, sin = (part.repeat(1, 2).unsqueeze(1) for part in (rotary.real, rotary.imag))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_reordering_rows_is_undone(heads: int, pairs: int, columns: int) -> None:
    rows = heads * pairs * 2
    weight = torch.arange(rows * columns).view(rows, columns)
    assert torch.equal(pairs_from_halves(halves_from_pairs(weight, heads), heads), weight)


def test_rotated_halves_score_as_rotated_pairs() -> None:
    torch.manual_seed(0)
    query, key, x = torch.randn(32, DIM), torch.randn(32, DIM), torch.randn(6, DIM)
    rotary = rotary_frequencies(HEAD_DIM, 6)

    def project(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).view(6, HEADS, HEAD_DIM)

    ours = [apply_rotary(project(weight), rotary) for weight in (query, key)]
    theirs = [
        rotate_halves(project(halves_from_pairs(weight, HEADS)), rotary) for weight in (query, key)
    ]
    scores, their_scores = (torch.einsum("qhd,khd->hqk", *pair) for pair in (ours, theirs))
    torch.testing.assert_close(scores, their_scores)


def test_every_parameter_has_a_name_of_its_own_in_both_formats() -> None:
    shapes = SHAPES["110M"].config.parameter_shapes()
    for rename in (hf_name, gguf_name):
        assert len({rename(name) for name in shapes}) == len(shapes)
    assert hf_name("layers.3.attention.wq.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert gguf_name("layers.3.feed_forward.w2.weight") == "blk.3.ffn_down.weight"


def test_only_queries_and_keys_are_reordered() -> None:
    config = SHAPES["tiny"].config
    moved = set()
    for name, shape in config.parameter_shapes().items():
        weight = torch.arange(torch.Size(shape).numel()).view(shape)
        if not torch.equal(hf_weight(name, weight, config), weight):
            moved.add(name.split(".")[-2])
    assert moved == {"wq", "wk"}
