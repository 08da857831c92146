"""Attention by PyTorch's scaled_dot_product_attention, on any device and in any dtype.

It serves the CPU, and is the reference against which other backends are tested.
"""

from collections.abc import Sequence

import torch

from model_service.model.attention.backend import (
    BlockCopy,
    CacheShape,
    SequenceSpan,
    copy_blocks,
    narrowed,
)
from model_service.model.attention.sdpa_call import attend, merged
from model_service.model.attention.sdpa_plan import SdpaPlanner

# Below this many bytes of keys and values, copying a run costs less than a call and merging.
_MIN_BYTES_IN_PLACE = 4 * 2**20


class SdpaAttention:
    """Attends with as few copies of keys and values as calls to the kernel allow.

    Query heads that share keys and values never repeat these: they are rows of one matrix if a span
    has few tokens, and heads with a common key (stride 0) if it has more.

    Long runs of neighbouring blocks are attended in place. Other blocks are copied into a buffer
    that all layers use; spans of one token (decode) are copied together, padded to the longest. The
    parts of a span are weighted by their sums of exponentials, like the blocks of FlashAttention
    (Dao et al., 2022).
    """

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        min_bytes_in_place: int = _MIN_BYTES_IN_PLACE,
    ) -> None:
        """Allocates the cache.

        Args:
            shape: of the cache.
            dtype: of queries, keys and values.
            device: of the cache and the arguments of `attend`.
            kv_dtype: of keys and values in the cache; None for `dtype`.
            min_bytes_in_place: size of keys and values below which a run of neighbouring blocks is
                copied, together with the other blocks of its span.
        """
        slots = shape.blocks * shape.block_size
        size = (shape.layers, slots, shape.kv_heads, shape.head_dim)
        self._kv_dtype = kv_dtype or dtype
        # PyTorch copies bytes by indices, but not 8-bit floats.
        stored = torch.uint8 if self._kv_dtype.itemsize == 1 else self._kv_dtype
        # Not zeroed: no slot is read before its token is written, and untouched memory is free.
        self._keys = torch.empty(size, dtype=stored, device=device)
        self._values = torch.empty(size, dtype=stored, device=device)
        # The target of `_select`, because a new buffer in each layer would cost page faults.
        self._buffers = [torch.empty(0, *size[2:], dtype=stored, device=device) for _ in range(2)]
        self._block_size = shape.block_size
        self._dtype = dtype
        token_bytes = 2 * shape.kv_heads * shape.head_dim * stored.itemsize
        min_run = min_bytes_in_place / token_bytes
        self._planner = SdpaPlanner(shape.block_size, dtype, device, min_run=min_run)
        self._step = self._planner.plan([])

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        self._step = self._planner.plan(spans)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for cache in (self._keys, self._values):
            blocks = cache.view(len(cache), -1, self._block_size, *cache.shape[2:])
            copy_blocks(blocks, copies)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values, step = self._keys[layer], self._values[layer], self._step
        keys.index_copy_(0, step.new_slots, self._stored(key))
        values.index_copy_(0, step.new_slots, self._stored(value))
        output = torch.empty_like(query)
        parts: list[list[torch.Tensor]] = []
        for group in step.groups:
            key, value = (self._loaded(each) for each in self._select(keys, values, group.slots))
            in_parts = step.part_rows is not None
            attended = attend(query[group.rows], key, value, group, with_sums=in_parts)
            if in_parts:
                parts.append(attended)
            else:
                [output[group.rows]] = attended
        return output if step.part_rows is None else merged(parts, step.part_rows, output)

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        return narrowed(x, self._kv_dtype).view(self._keys.dtype)

    def _loaded(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.view(self._kv_dtype).to(self._dtype)

    def _select(
        self, keys: torch.Tensor, values: torch.Tensor, slots: slice | torch.Tensor
    ) -> Sequence[torch.Tensor]:
        if isinstance(slots, slice):
            return keys[slots], values[slots]
        if len(self._buffers[0]) < len(slots):
            self._buffers = [keys.new_empty(len(slots), *keys.shape[1:]) for _ in range(2)]
        buffers = [buffer[: len(slots)] for buffer in self._buffers]
        for stored, buffer in zip((keys, values), buffers, strict=True):
            torch.index_select(stored, 0, slots, out=buffer)
        return buffers
