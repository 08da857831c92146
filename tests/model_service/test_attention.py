from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.model.attention.backend import BlockCopy, SequenceSpan, narrowed
from tests.model_service.conftest import CACHE, HEADS, spread

KV_HEADS, HEAD_DIM = CACHE.kv_heads, CACHE.head_dim


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over one whole sequence [length, heads, head_dim], written out."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
    mask = torch.ones(len(query), len(query)).tril().bool()
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def tensors(lengths: list[int], seed: int) -> list[list[torch.Tensor]]:
    """Queries, keys and values of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(length, heads, HEAD_DIM, generator=generator) for length in lengths]
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def attend_in_chunks(
    backend: Any, parts: list[list[torch.Tensor]], chunk: int, seed: int
) -> list[torch.Tensor]:
    """Attention of each sequence's queries, all sequences together, step by step."""
    lengths = [len(query) for query in parts[0]]
    tables = [span.block_table for span in spread(lengths, lengths, CACHE, seed)]
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    for begin in range(0, max(lengths), chunk):
        live = [i for i, length in enumerate(lengths) if begin < length]
        ends = {i: min(begin + chunk, lengths[i]) for i in live}
        # As the scheduler does: sequences of one token first.
        live.sort(key=lambda i: ends[i] - begin)
        backend.plan([SequenceSpan(ends[i] - begin, ends[i], tables[i]) for i in live])
        flat = [torch.cat([x[i][begin : ends[i]] for i in live]) for x in parts]
        sizes = [ends[i] - begin for i in live]
        for i, output in zip(live, backend.attend(0, *flat).split(sizes), strict=True):
            outputs[i].append(output)
    return [torch.cat(output) for output in outputs]


@pytest.mark.parametrize("name", ["sdpa", "in parts", "flashinfer"])
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_chunks_over_scattered_blocks_equal_dense_attention(
    backends: Any, name: str, lengths: list[int], chunk: int, seed: int
) -> None:
    parts = tensors(lengths, seed)
    attended = attend_in_chunks(backends[name](CACHE, HEADS), parts, chunk, seed)
    for output, *sequence in zip(attended, *parts, strict=True):
        torch.testing.assert_close(output, dense(*sequence), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "in parts", "flashinfer"])
def test_a_cache_of_eight_bits_changes_attention_by_its_rounding(backends: Any, name: str) -> None:
    parts = tensors([13, 7, 1], seed=3)
    backend = backends[name](CACHE, HEADS, torch.float8_e4m3fn)
    attended = torch.cat(attend_in_chunks(backend, parts, 4, seed=3))
    exact = torch.cat([dense(*sequence) for sequence in zip(*parts, strict=True)])
    error = (attended - exact).norm() / exact.norm()
    # A value moves by 2^-4 of itself at most, by less than half of that in the mean.
    assert 0.001 < error < 0.05


@pytest.mark.parametrize("name", ["sdpa", "in parts", "flashinfer"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_copied_block_is_attended_as_its_source(
    backends: Any, name: str, kv_dtype: torch.dtype
) -> None:
    backend = backends[name](CACHE, HEADS, kv_dtype)
    first, second = zip(*tensors([10, 10], seed=5), strict=True)
    for beginning, whole in zip(first, second, strict=True):
        whole[:6] = beginning[:6]
    outputs = []
    # A block that is copied on before its own content is overwritten, as the pool may have it.
    for copies in ([], [BlockCopy(2, 7), BlockCopy(7, 9)]):
        backend.plan([SequenceSpan(10, 10, [4, 2, 8])])
        backend.attend(0, *first)
        backend.copy(copies)
        known = 6 if copies else 0
        backend.plan([SequenceSpan(10 - known, 10, [4, 9, 7])])
        outputs.append(backend.attend(0, *(each[known:] for each in second)))
    torch.testing.assert_close(outputs[1], outputs[0][6:], atol=1e-5, rtol=1e-5)
    backend.plan([SequenceSpan(1, 10, [4, 2, 8])])
    last = backend.attend(0, *(each[-1:] for each in first))
    expected = dense(*first)[-1:]
    torch.testing.assert_close(last, expected, atol=0.1 if kv_dtype.itemsize == 1 else 1e-5, rtol=0)


def test_what_eight_bits_cannot_hold_becomes_their_largest() -> None:
    wide = torch.tensor([1e9, -500.0, 448.0, 0.5])
    assert narrowed(wide, torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 448.0, 0.5]


def test_a_step_in_any_order_is_attended(backends: Any) -> None:
    spans = spread([6, 5, 9, 1], [1, 3, 1, 1], CACHE, seed=1)
    flat = [torch.randn(6, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    outputs = []
    for make in backends.values():
        backend = make(CACHE, HEADS)
        for cache in (getattr(backend, "_cache", backend),):
            cache._keys.fill_(0.5)
            cache._values.fill_(0.25)
        backend.plan(spans)
        outputs.append(backend.attend(0, *flat))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_long_runs_of_blocks_are_not_copied(backends: Any) -> None:
    spans = spread([13, 9], [1, 1], CACHE, seed=1)
    flat = [torch.randn(2, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    copied = {}
    for name in ("sdpa", "in parts"):
        backend = backends[name](CACHE, HEADS)
        backend.plan(spans)
        backend.attend(0, *flat)
        copied[name] = len(backend._buffers[0])
    assert copied == {"sdpa": 2 * 13, "in parts": 2}  # both padded to the longest
