"""The network's layers on CUDA in six kernels each, in the mode that is batch-invariant.

| kernel | computes |
|---|---|
| `products.write_heads` | norm, queries, keys and values, rotation, the write to the cache |
| `attention.attend` | attention: for rows that decode two kernels, splits and their joining |
| `products.add_product` | the output of attention, added to the residual stream |
| `products.multiply_gated` | norm, gate and up, SwiGLU |
| `products.add_product` | down, added to the residual stream |

With several shards the sums over them stand between a product and its addition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model_service.model.cuda.norm_kernel import add
from model_service.model.cuda.products import (
    Heads,
    Normed,
    add_product,
    multiply,
    multiply_gated,
    write_heads,
)
from model_service.model.cuda.tiled_weight import TiledWeight


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights: norms [dim], and matrices."""

    attention_norm: torch.Tensor
    wqkv: TiledWeight
    wo: TiledWeight
    ffn_norm: torch.Tensor
    w13: TiledWeight
    w2: TiledWeight


class InvariantLayers:
    """All layers of a rank; a token's bits depend on its own context alone."""

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        eps: float,
        sum_over_shards: Callable[[torch.Tensor], object] | None,
    ) -> None:
        """Takes over the weights.

        Args:
            weights: of all layers.
            eps: of the norms.
            sum_over_shards: adds up in place the parts of a product on all ranks, in one order;
                None if there is one rank.
        """
        self._weights = weights
        self._eps = eps
        self._sum_over_shards = sum_over_shards

    def run(
        self,
        stream: torch.Tensor,
        rotation: torch.Tensor,
        cache: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        slots: torch.Tensor,
        attend: Callable[[int, torch.Tensor], torch.Tensor],
        *,
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step over a flat batch.

        Args:
            stream: embeddings [tokens, dim], contiguous; overwritten.
            rotation: complex64 [tokens, head_dim / 2].
            cache: of a layer by its number, keys and values [blocks, block_size, kv_heads,
                head_dim].
            slots: int32 [tokens], where each token lies in the cache.
            attend: attention of a layer: its number, and rotated queries [tokens, heads ×
                head_dim]; returns as many numbers.
            query: contiguous memory for those queries, in all layers; None for new memory.

        Returns:
            The residual stream behind the last layer [tokens, dim].
        """
        angles = torch.view_as_real(rotation)
        squares = add(stream, None)
        for layer, weights in enumerate(self._weights):
            x = Normed(stream, squares, weights.attention_norm, self._eps)
            rotated = write_heads(x, weights.wqkv, Heads(angles, *cache(layer), slots), query)
            squares = self._add(attend(layer, rotated), weights.wo, stream)
            x = Normed(stream, squares, weights.ffn_norm, self._eps)
            squares = self._add(multiply_gated(x, weights.w13), weights.w2, stream)
        return stream

    def _add(self, x: torch.Tensor, weight: TiledWeight, stream: torch.Tensor) -> torch.Tensor:
        """Adds the product to the stream; returns the stream's sums of squares."""
        if self._sum_over_shards is None:
            return add_product(x, weight, stream)
        part = multiply(x, weight)
        self._sum_over_shards(part)
        return add(stream, part)
