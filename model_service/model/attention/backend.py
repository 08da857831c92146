"""The interface of attention over the paged KV cache.

A backend owns the cache of its rank. A step calls `plan` once with the sequences of the flat batch,
then `attend` once per layer, which writes the new keys and values and attends over block tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

# No sequence ever owns this block: steps that serve no sequence write there.
PROBE_BLOCK = 0


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of the flat batch."""

    query_length: int  # its tokens in this step
    context_length: int  # its tokens in the cache after this step
    block_table: Sequence[int]  # the blocks that hold them, in order


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The KV cache of one rank."""

    layers: int
    blocks: int
    block_size: int  # tokens per block
    kv_heads: int  # of this rank
    head_dim: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory for keys and values."""
        elements = self.layers * self.blocks * self.block_size * self.kv_heads * self.head_dim
        return 2 * elements * dtype.itemsize


class BlockCopy(NamedTuple):
    """An order to copy one block of the cache to another, in all layers."""

    source: int
    destination: int


class AttentionBackend(Protocol):
    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        """Prepares the next step, with its sequences in the order of the flat batch."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Writes the tokens' keys and values, then attends their queries over the cache.

        The arguments need not be contiguous, but their last two dimensions are.

        Args:
            layer: selects the part of the cache.
            query: [num_tokens, heads, head_dim].
            key: [num_tokens, kv_heads, head_dim].
            value: [num_tokens, kv_heads, head_dim].

        Returns:
            [num_tokens, heads, head_dim].
        """


class CachedAttention(AttentionBackend, Protocol):
    """A backend that owns its cache."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks, one after the other."""


def copy_blocks(cache: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
    """Copies blocks of keys or values [layers, blocks, ...], one after the other."""
    for source, destination in copies:
        cache[:, destination] = cache[:, source]


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values in the cache's dtype.

    8-bit codes have no scale: the relative step of e4m3 is as fine at 2^-6 as at 448, so a scale
    would have to be calibrated and would move the error instead of lessening it. Larger values
    become ±448, because the conversion of older PyTorch versions would turn them into NaN.
    """
    if x.dtype == dtype:
        return x
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)
