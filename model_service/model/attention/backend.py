"""Attention over the paged KV cache, behind one small interface.

A backend owns the cache of its rank. `plan` is called once per step with the sequences of the flat
batch, `attend` once per layer: it writes the new keys and values, then attends over block tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

# No sequence ever owns it: steps that are not for a sequence write there.
PROBE_BLOCK = 0


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of the flat batch."""

    query_length: int  # tokens of it in this step
    context_length: int  # tokens of it in the cache once this step has written its own
    block_table: Sequence[int]  # blocks that hold them, in order


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
    """What stands in one block of the cache, in all layers, is to stand in another one, too."""

    source: int
    destination: int


class AttentionBackend(Protocol):
    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        """Takes the sequences of the next step, in the order of the flat batch."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Writes the tokens' keys and values, then attends their queries over the cache.

        The arguments need not be contiguous, but their last two dimensions are.

        Args:
            layer: whose part of the cache.
            query: [num_tokens, heads, head_dim].
            key: [num_tokens, kv_heads, head_dim], like value.
            value: what attention mixes.

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

    Into 8 bits without a scale: e4m3 has as fine a relative step at 2^-6 as at 448, so a scale
    would move, not lessen, the error of what lies between, and would have to be calibrated. What
    lies beyond becomes 448; of that, older PyTorch's conversion alone would make a NaN.
    """
    if x.dtype == dtype:
        return x
    if dtype.itemsize == 1:
        most = torch.finfo(dtype).max
        x = x.clamp(-most, most)
    return x.to(dtype)
