"""Attention over the paged cache whose sums depend on a token's own context alone.

A context is cut into splits of `SPLIT` tokens from its beginning. Each split has a softmax and sums
of its own, and these are joined from the first split to the last, as the CPU's kernels do. For rows
that decode, a program computes one split, and a second kernel joins them: few rows then keep a
whole device busy. For prompts, a program computes all splits of some tokens and joins them on the
way. Both are one compiled kernel, told by a number how many splits to compute, and a row's place
in a tile changes none of its bits: so neither do chunks of prompts, nor the rows beside it.
"""

import math
from dataclasses import dataclass

import torch
import triton

from model_service.model.cuda.attention_kernel import attend_tile, join_splits

SPLIT = 128  # tokens of a context
_ROWS = 16  # of queries in a tile: a matrix unit's smallest
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The sequences of a step, as the kernels read them; tensors are int32 on the device.

    Attributes:
        slots: [tokens], where each token lies in the cache.
        tiles: [tiles, 4], each some tokens of one sequence: its first token in the flat batch, how
            many they are, how many tokens of the context the first one sees, and where the
            sequence's blocks begin in `pages`.
        pages: the blocks of all sequences.
        decodes: leading tiles of one token, whose splits are computed apart.
        splits: the most splits of their contexts.
    """

    slots: torch.Tensor
    tiles: torch.Tensor
    pages: torch.Tensor
    decodes: int
    splits: int


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch of the kernel, for some tiles of a step.

    Attributes:
        first_tile: of the step's.
        tiles: how many.
        splits: how many of each are computed apart; 0 if a program joins all of a tile.
        output: [tokens, heads × head_dim], of joined splits.
        parts: [tiles, heads, splits, head_dim] float32, the sums of splits apart.
        scales: [tiles, heads, splits, 2] float32, the largest score and the sum of each.
    """

    first_tile: int
    tiles: int
    splits: int
    output: torch.Tensor
    parts: torch.Tensor
    scales: torch.Tensor


def tokens_per_tile(heads: int, kv_heads: int) -> int:
    """Tokens of a tile: all queries that share a head of keys are rows of it."""
    shared = heads // kv_heads
    return _tile_rows(shared) // shared


def attend(
    query: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    step: AttentionStep,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the step's tokens.

    Args:
        query: rotated, [tokens, heads × head_dim].
        cache: of the layer, keys and values [blocks, block_size, kv_heads, head_dim].
        step: has written its tokens there.
        output: receives the result, instead of new memory; contiguous.

    Returns:
        [tokens, heads × head_dim] in the queries' dtype.
    """
    if output is None:
        output = torch.empty_like(query)
    prompts = len(step.tiles) - step.decodes
    if step.decodes:
        _attend_in_splits(query, cache, step, output)
    if prompts:
        # With the type of parts: a pointer of another would compile another kernel.
        nothing = query.new_empty(0, dtype=torch.float32)
        joined = _Launch(step.decodes, prompts, 0, output, nothing, nothing)
        _launch(query, cache, step, joined)
    return output


def _attend_in_splits(
    query: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    step: AttentionStep,
    output: torch.Tensor,
) -> None:
    head_dim = cache[0].shape[3]
    heads = query.shape[1] // head_dim
    parts = query.new_empty(step.decodes, heads, step.splits, head_dim, dtype=torch.float32)
    scales = query.new_empty(step.decodes, heads, step.splits, 2, dtype=torch.float32)
    _launch(query, cache, step, _Launch(0, step.decodes, step.splits, output, parts, scales))
    join_splits[(step.decodes, heads)](
        parts,
        scales,
        output,
        step.tiles,
        step.splits,
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        SPLIT=SPLIT,
        num_warps=1,
        enable_fp_fusion=False,
    )


def _launch(
    query: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    step: AttentionStep,
    launch: _Launch,
) -> None:
    narrows = cache[0].dtype.itemsize == 1
    keys, values = (each.view(torch.uint8) if narrows else each for each in cache)
    _, block_size, kv_heads, head_dim = keys.shape
    shared = query.shape[1] // head_dim // kv_heads
    at_once, stages = read_ahead(in_float32=query.dtype == torch.float32)
    attend_tile[(launch.tiles, kv_heads, max(launch.splits, 1))](
        query,
        keys,
        values,
        launch.output,
        launch.parts,
        launch.scales,
        step.tiles,
        step.pages,
        launch.first_tile,
        launch.splits,
        KV_HEADS=kv_heads,
        SHARED=shared,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        NARROWED=narrows,
        SCALE=_LOG2_E / math.sqrt(head_dim),
        ROWS=_tile_rows(shared),
        DIM=max(16, triton.next_power_of_2(head_dim)),
        KEYS=at_once,
        SPLIT=SPLIT,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=False,
    )


def read_ahead(*, in_float32: bool) -> tuple[int, int]:
    """Keys that a program reads at once, and how many reads are under way at a time.

    float32 is multiplied without matrix units, for which registers hold whole tiles.
    """
    return (16, 1) if in_float32 else (64, 2)


def _tile_rows(shared: int) -> int:
    return int(max(_ROWS, triton.next_power_of_2(shared)))
