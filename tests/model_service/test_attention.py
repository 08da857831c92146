import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from model_service.model.attention import CacheShape, SdpaAttention, SequenceSpan

HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 4, 2, 8, 4, 24
SHAPE = CacheShape(layers=1, blocks=BLOCKS, block_size=BLOCK, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over one whole sequence [length, heads, head_dim], written out."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / HEAD_DIM**0.5
    mask = torch.ones(len(query), len(query)).tril().bool()
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_chunks_over_scattered_blocks_equal_dense_attention(
    lengths: list[int], chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    backend = SdpaAttention(SHAPE, torch.float32, torch.device("cpu"))
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    query, key, value = (
        [torch.randn(length, heads, HEAD_DIM, generator=generator) for length in lengths]
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    parts: list[list[torch.Tensor]] = [[] for _ in lengths]
    for begin in range(0, max(lengths), chunk):
        live = [i for i, length in enumerate(lengths) if begin < length]
        ends = {i: min(begin + chunk, lengths[i]) for i in live}
        backend.plan([SequenceSpan(ends[i] - begin, ends[i], tables[i]) for i in live])
        flat = [torch.cat([x[i][begin : ends[i]] for i in live]) for x in (query, key, value)]
        output = backend.attend(0, *flat)
        sizes = [ends[i] - begin for i in live]
        for i, part in zip(live, torch.split(output, sizes), strict=True):
            parts[i].append(part)
    for i in range(len(lengths)):
        expected = dense(query[i], key[i], value[i])
        torch.testing.assert_close(torch.cat(parts[i]), expected, atol=1e-5, rtol=1e-5)
