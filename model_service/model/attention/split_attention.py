"""Attention of the mode that is batch-invariant on CUDA, behind the backend interface.

`cuda/attention.py` computes it. Here is what its kernels read of a step, in one vector on the
device, so that one copy fills it; at a fixed batch size in one whose address stays the same, so
that a CUDA graph can hold the launches. `select.py` imports this module only with Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.model.attention.backend import (
    AttentionBackend,
    BlockCopy,
    CacheShape,
    PagedCache,
    SequenceSpan,
)
from model_service.model.attention.page_tables import leading_decodes, page_tables, query_tiles
from model_service.model.attention.rotation import Cache, Heads, rotate_and_write
from model_service.model.cuda.attention import SPLIT, AttentionStep, attend, tokens_per_tile
from model_service.model.cuda.layers import InvariantLayers
from model_service.model.cuda.pinned_transfer import pinned

_TILE = 4  # numbers of a tile
_ALIGNED = 4  # numbers of 32 bits, so that each part of a vector begins at 16 bytes


class _PlannedStep:
    """A backend's part that is the same for every kind of plan."""

    _kernels: "_Kernels"
    _step: AttentionStep

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self._kernels.attend(layer, Heads(query, key, value), self._step)

    def run_layers(
        self, layers: InvariantLayers, x: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """See `RunsLayers`."""
        return self._kernels.run_layers(layers, x, rotation, self._step), None


class SplitAttention(_PlannedStep):
    """Prefill and decode of any mixture; a token's result depends on its own context alone."""

    def __init__(
        self,
        shape: CacheShape,
        device: torch.device,
        kv_dtype: torch.dtype,
        *,
        heads: int,
    ) -> None:
        """Allocates the cache.

        Args:
            shape: of this rank's cache.
            device: of this rank.
            kv_dtype: of keys and values in the cache: `dtype`, or torch.float8_e4m3fn.
            heads: query heads of this rank.
        """
        self._kernels = _Kernels(
            PagedCache(shape, kv_dtype, device),
            shape.block_size,
            tokens_per_tile(heads, shape.kv_heads),
        )
        self._device = device
        self._step = self._kernels.step(torch.empty(0, dtype=torch.int32), (0, 0, 0), 0, 0)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = page_tables(spans, self._kernels.block_size)
        tiles = query_tiles(tables, self._kernels.tokens_per_tile)
        parts = tables.slots, tiles.reshape(-1), tables.pages
        sizes = len(parts[0]), len(tiles), len(parts[2])
        image = _image(parts, [_aligned(len(part)) for part in parts])
        (packed,) = pinned(self._device, (image,))
        vector = packed.to(self._device, non_blocking=True)
        decodes = leading_decodes(spans)
        longest = max((span.context_length for span in spans[:decodes]), default=0)
        self._step = self._kernels.step(vector, sizes, decodes, longest)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        self._kernels.cache.copy(copies)

    @property
    def slots(self) -> torch.Tensor:
        """int32 [tokens], where each token of the planned step lies in the cache."""
        return self._step.slots

    def layer_cache(self, layer: int) -> Cache:
        return self._kernels.cache.layer(layer)

    def attend_written(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        """See `graphs.SeparableAttention`."""
        tokens = len(self.slots)
        query, output = (each[:tokens].flatten(1) for each in (query, output))
        attend(query, self.layer_cache(layer), self._step, output)

    def fixed_batches(
        self, sizes: Sequence[int], context_length: int
    ) -> dict[int, AttentionBackend]:
        """A backend for decode steps of each of `sizes` sequences, on the same cache.

        All of them read the same vector, so only one of them may be planned at a time.
        """
        rows = max(sizes)
        pages = rows * -(-context_length // self._kernels.block_size)
        starts = [_aligned(rows), _TILE * rows]
        vector = torch.zeros(sum(starts) + pages, dtype=torch.int32, device=self._device)
        return {
            size: _FixedDecode(self._kernels, vector, starts, size, context_length)
            for size in sizes
        }


class _FixedDecode(_PlannedStep):
    """Decode of a fixed number of sequences, from a vector with a fixed address."""

    def __init__(
        self,
        kernels: "_Kernels",
        vector: torch.Tensor,
        lengths: Sequence[int],
        size: int,
        context_length: int,
    ) -> None:
        """Takes a vector whose first parts have these lengths."""
        self._kernels = kernels
        self._vector = vector
        self._lengths = lengths
        slots, tiles, pages = torch.split(vector, [*lengths, len(vector) - sum(lengths)])
        self._step = AttentionStep(
            slots[:size], tiles.view(-1, _TILE)[:size], pages, size, _splits(context_length)
        )

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = page_tables(spans, self._kernels.block_size)
        tiles = query_tiles(tables, self._kernels.tokens_per_tile).reshape(-1)
        parts = tables.slots, tiles, tables.pages
        image = _image(parts, [*self._lengths, len(tables.pages)])
        (packed,) = pinned(self._vector.device, (image,))
        self._vector[: len(packed)].copy_(packed, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """The kernels over a cache, for any step."""

    cache: PagedCache
    block_size: int
    tokens_per_tile: int

    def step(
        self, vector: torch.Tensor, sizes: tuple[int, int, int], decodes: int, longest: int
    ) -> AttentionStep:
        """A step of so many slots, tiles and pages, which lie in the vector one by one."""
        slots, tiles, pages = sizes
        lengths = [_aligned(slots), _TILE * tiles, _aligned(pages)]
        parts = torch.split(vector, lengths)
        tile_rows = parts[1].view(tiles, _TILE)
        return AttentionStep(
            parts[0][:slots], tile_rows, parts[2][:pages], decodes, _splits(longest)
        )

    def attend(self, layer: int, heads: Heads, step: AttentionStep) -> torch.Tensor:
        cache = self.cache.layer(layer)
        rotate_and_write(heads, None, cache, step.slots)
        query = heads.query
        return attend(query.flatten(1).contiguous(), cache, step).view(query.shape)

    def run_layers(
        self,
        layers: InvariantLayers,
        x: torch.Tensor,
        rotation: torch.Tensor,
        step: AttentionStep,
    ) -> torch.Tensor:
        def attended(layer: int, query: torch.Tensor) -> torch.Tensor:
            return attend(query, self.cache.layer(layer), step)

        return layers.run(x, rotation, self.cache.layer, step.slots, attended)


def _splits(context_length: int) -> int:
    return -(-context_length // SPLIT)


def _aligned(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED


def _image(parts: Sequence[NDArray[np.int32]], lengths: Sequence[int]) -> NDArray[np.int32]:
    """The parts one behind the other, each filled up with zeros to its length."""
    image = np.zeros(sum(lengths), dtype=np.int32)
    begin = 0
    for part, length in zip(parts, lengths, strict=True):
        image[begin : begin + len(part)] = part
        begin += length
    return image
