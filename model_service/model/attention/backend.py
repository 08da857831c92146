"""The interface of attention over the paged KV cache.

A backend owns the cache of its rank. A step calls `plan` once with the sequences of the flat batch,
then `attend` once per layer, which writes the new keys and values and attends over block tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.model.cpu.layers import Scan

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


@runtime_checkable
class RunsLayers(Protocol):
    """A backend whose kernels compute whole layers, attention included."""

    def run_layers(
        self,
        layers: Any,  # noqa: ANN401  # of the backend's own device
        x: torch.Tensor,
        rotation: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All layers of a step.

        Args:
            layers: the network's, as `load_network` has made them for this backend.
            x: embeddings [tokens, dim], contiguous; overwritten.
            rotation: complex64 [tokens, head_dim / 2].

        Returns:
            The last layer's output [tokens, dim], and the residual stream to which it is still to
            be added; None if it has been.
        """


@runtime_checkable
class RunsSteps(Protocol):
    """A backend whose kernels compute whole steps."""

    def run_step(
        self,
        step: Any,  # noqa: ANN401  # of the backend's own device
        tokens: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
    ) -> tuple[torch.Tensor, Scan]:
        """The planned step; see `Transformer.forward`.

        Args:
            step: the network's, as `load_network` has made it for this backend.
            tokens: ids [num_tokens].
            logit_rows: [num_logits].

        Returns:
            Logits [num_logits, vocab] in float32, which the next step overwrites.
        """


class CachedAttention(AttentionBackend, Protocol):
    """A backend that owns its cache."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks, one after the other."""


def copy_blocks(cache: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
    """Copies blocks of keys or values [layers, blocks, ...], one after the other."""
    for source, destination in copies:
        cache[:, destination] = cache[:, source]


class PagedCache:
    """Keys and values of all layers [layers, blocks, block_size, kv_heads, head_dim]."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.layers, shape.blocks, shape.block_size, shape.kv_heads, shape.head_dim)
        self._keys, self._values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        # Asked for in every layer of a step: views cost the host time.
        self._layers = [*zip(self._keys, self._values, strict=True)]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for cache in (self._keys, self._values):
            copy_blocks(cache, copies)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer]


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
