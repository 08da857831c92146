"""Attention on the CPU over fixed tiles of each sequence's context.

The result for a token depends on its own context alone, to the last bit: it is the same in a prompt
and in an answer, alone and beside other sequences, and for all sizes of chunks and blocks.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.model.attention.backend import (
    BlockCopy,
    CacheShape,
    SequenceSpan,
    copy_blocks,
)
from model_service.model.cpu.kernels import AttentionCache, AttentionSpan, Kernels
from model_service.model.cpu.layers import CompiledLayers, CompiledStep, Scan


class FixedTileAttention:
    """Reads keys and values in place, whatever their blocks are.

    Attributes:
        caches: of each layer, as the library takes them.
        spans: the sequences of the step, likewise.
    """

    def __init__(self, kernels: Kernels, shape: CacheShape, kv_dtype: torch.dtype) -> None:
        """Allocates the cache, of the kernels' dtype or 8-bit floats."""
        self._kernels = kernels
        eight_bits = kv_dtype.itemsize == 1
        stored = torch.uint8 if eight_bits else kv_dtype  # PyTorch does not copy 8-bit floats
        heads = (shape.layers, shape.blocks, shape.kv_heads)
        # source/attention/cache.h has their order in a block, in which values lie in pairs. Not
        # zeroed: no slot is read before its token is written, and untouched memory is free.
        even = shape.block_size + shape.block_size % 2
        self._keys = torch.empty(*heads, shape.head_dim * shape.block_size, dtype=stored)
        self._values = torch.empty(*heads, shape.head_dim * even, dtype=stored)
        self.caches = (AttentionCache * shape.layers)()
        for cache, keys, values in zip(self.caches, self._keys, self._values, strict=True):
            cache.keys, cache.values = keys.data_ptr(), values.data_ptr()
            cache.eight_bits, cache.kv_heads = eight_bits, shape.kv_heads
            cache.head_dim, cache.block_size = shape.head_dim, shape.block_size
        self.plan([])

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = array("i")
        for span in spans:
            tables.extend(span.block_table)
        address, row = tables.buffer_info()[0], 0
        self._tables = tables  # the spans point into it
        self.spans = (AttentionSpan * len(spans))()
        for planned, span in zip(self.spans, spans, strict=True):
            planned.table, planned.row = address, row
            planned.query_length, planned.context_length = span.query_length, span.context_length
            address += len(span.block_table) * tables.itemsize
            row += span.query_length

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for cache in (self._keys, self._values):
            copy_blocks(cache, copies)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self._kernels.attend(self.caches[layer], self.spans, query, key, value)

    def run_layers(
        self, layers: CompiledLayers, x: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RunsLayers`."""
        return layers.run(x, rotation, self.caches, self.spans)

    def run_step(
        self,
        step: CompiledStep,
        tokens: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
    ) -> tuple[torch.Tensor, Scan]:
        """See `RunsSteps`."""
        return step.run(tokens, logit_rows, self.caches, self.spans)
