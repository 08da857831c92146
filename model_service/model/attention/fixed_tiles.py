"""Attention in bfloat16 on the CPU, over fixed tiles of each sequence's context.

The result for a token depends on its own context alone, to the last bit: it is the same in a prompt
and in an answer, alone and beside other sequences, and for all sizes of chunks and blocks.
"""

from array import array
from collections.abc import Sequence

import torch

from model_service.model.attention.backend import (
    BlockCopy,
    CacheShape,
    SequenceSpan,
    copy_blocks,
    narrowed,
)
from model_service.model.cpu.kernels import AttentionCache, AttentionSpan, Kernels


class FixedTileAttention:
    """Reads keys and values in place, whatever their blocks are."""

    def __init__(self, kernels: Kernels, shape: CacheShape, kv_dtype: torch.dtype) -> None:
        """Allocates the cache, of bfloat16 or 8-bit floats."""
        self._kernels = kernels
        self._kv_dtype = kv_dtype
        eight_bits = kv_dtype.itemsize == 1
        stored = torch.uint8 if eight_bits else kv_dtype  # PyTorch does not copy 8-bit floats
        heads = (shape.layers, shape.blocks, shape.kv_heads)
        # Not zeroed: no slot is read before its token is written, and untouched memory is free.
        # Neighbouring tokens' keys lie so that one load gets the same feature of all.
        self._keys = torch.empty(*heads, shape.head_dim, shape.block_size, dtype=stored)
        self._values = torch.empty(*heads, shape.block_size, shape.head_dim, dtype=stored)
        codes = torch.arange(256, dtype=torch.uint8)
        self._widened = codes.view(kv_dtype).float() if eight_bits else None
        widened = None if self._widened is None else self._widened.data_ptr()
        self._layers = [
            AttentionCache(
                keys.data_ptr(),
                values.data_ptr(),
                widened,
                shape.kv_heads,
                shape.head_dim,
                shape.block_size,
            )
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self.plan([])

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        tables = array("i")
        for span in spans:
            tables.extend(span.block_table)
        address, row = tables.buffer_info()[0], 0
        self._tables = tables  # the spans point into it
        self._spans = (AttentionSpan * len(spans))()
        for planned, span in zip(self._spans, spans, strict=True):
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
        cache = self._layers[layer]
        key, value = narrowed(key, self._kv_dtype), narrowed(value, self._kv_dtype)
        self._kernels.write(cache, self._spans, key, value)
        return self._kernels.attend(cache, self._spans, query)
