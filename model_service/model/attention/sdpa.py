"""Attention by PyTorch's scaled_dot_product_attention, on any device and in any dtype.

It serves the CPU, and is the reference against which other backends are tested.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from model_service.model.attention.backend import (
    BlockCopy,
    CacheShape,
    SequenceSpan,
    copy_blocks,
    narrowed,
)
from model_service.model.attention.sdpa_call import Group, attend, merged

# Below this many tokens, copying a span beside others costs less than a call of its own.
_MIN_TOKENS_IN_PLACE = 256
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
        self._device = device
        token_bytes = 2 * shape.kv_heads * shape.head_dim * stored.itemsize
        self._min_run = min_bytes_in_place / token_bytes  # tokens
        self._groups: list[Group] = []
        # The batch's row of each token in all groups; None if each row is in one group.
        self._part_rows: torch.Tensor | None = None
        self._new_slots = torch.empty(0, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        groups: list[Group] = []
        new_slots: list[torch.Tensor] = []
        copied: list[tuple[int, torch.Tensor]] = []  # row, slots
        parts = False
        row = 0
        for span in spans:
            slots = self._slots(span)
            new_slots.append(slots[-span.query_length :])
            rows = slice(row, row + span.query_length)
            neighbours = _are_neighbours(span.block_table)
            rest: slice | torch.Tensor = slice(None)
            if runs := [] if neighbours else self._long_runs(span):
                parts = True
                groups += (Group(rows, spans=1, slots=_as_slice(slots[run])) for run in runs)
                rest = torch.ones(len(slots), dtype=torch.bool)
                for run in runs:
                    rest[run] = False
            one_of_many = span.query_length == 1 and len(spans) > 1
            if one_of_many and not (neighbours and len(slots) >= _MIN_TOKENS_IN_PLACE):
                copied.append((row, slots[rest]))
            else:
                selected = _as_slice(slots) if neighbours else slots[rest].to(self._device)
                groups.append(self._single(span, rows, selected, rest))
            row += span.query_length
        self._groups = groups + [self._padded(batch) for batch in _batches_by_length(copied)]
        self._part_rows = _concatenated_rows(self._groups, row) if parts else None
        self._new_slots = torch.cat(new_slots).to(self._device)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for cache in (self._keys, self._values):
            blocks = cache.view(len(cache), -1, self._block_size, *cache.shape[2:])
            copy_blocks(blocks, copies)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new_slots, self._stored(key))
        values.index_copy_(0, self._new_slots, self._stored(value))
        output = torch.empty_like(query)
        parts: list[list[torch.Tensor]] = []
        for group in self._groups:
            key, value = (self._loaded(each) for each in self._select(keys, values, group.slots))
            in_parts = self._part_rows is not None
            attended = attend(query[group.rows], key, value, group, with_sums=in_parts)
            if in_parts:
                parts.append(attended)
            else:
                [output[group.rows]] = attended
        return output if self._part_rows is None else merged(parts, self._part_rows, output)

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

    def _slots(self, span: SequenceSpan) -> torch.Tensor:
        """The slots of a sequence's tokens in the cache [context_length]."""
        first = torch.tensor(span.block_table, dtype=torch.long) * self._block_size
        slots = first.unsqueeze(1) + torch.arange(self._block_size)
        return slots.flatten()[: span.context_length]

    def _long_runs(self, span: SequenceSpan) -> list[slice]:
        """The tokens that are attended in place, if a span's blocks are not all neighbours.

        They are older than the step's tokens, so that no mask must hide any of them.
        """
        if span.context_length < self._min_run or self._device.type != "cpu":
            return []
        table, older = span.block_table, span.context_length - span.query_length
        breaks = [at for at in range(1, len(table)) if table[at] != table[at - 1] + 1]
        runs = [
            slice(first * self._block_size, min(end * self._block_size, older))
            for first, end in itertools.pairwise([0, *breaks, len(table)])
        ]
        return [run for run in runs if run.stop - run.start >= self._min_run]

    def _single(
        self,
        span: SequenceSpan,
        rows: slice,
        slots: slice | torch.Tensor,
        columns: slice | torch.Tensor,
    ) -> Group:
        """The group of one span, over those of its tokens that `columns` selects, at `slots`."""
        whole = span.query_length == span.context_length
        several = span.query_length > 1
        return Group(
            rows=rows,
            spans=1,
            slots=slots,
            mask=self._causal_mask(span, columns) if several and not whole else None,
            causal=whole and several,
        )

    def _padded(self, batch: Sequence[tuple[int, torch.Tensor]]) -> Group:
        """The group of spans of one token, by their rows and slots."""
        rows, slots = zip(*batch, strict=True)
        lengths = torch.tensor([len(each) for each in slots])
        longest = int(lengths.max())
        padding = torch.arange(longest) >= lengths.unsqueeze(1)
        return Group(
            rows=torch.tensor(rows, device=self._device),
            spans=len(batch),
            slots=torch.cat([_pad(each, longest) for each in slots]).to(self._device),
            mask=self._additive(padding).view(len(batch), 1, 1, longest) if padding.any() else None,
        )

    def _causal_mask(self, span: SequenceSpan, columns: slice | torch.Tensor) -> torch.Tensor:
        """[1, 1, query_length, columns]: a token at position p sees positions 0 to p."""
        positions = torch.arange(span.context_length)
        hidden = positions[columns] > positions[-span.query_length :].unsqueeze(1)
        return self._additive(hidden)[None, None]

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
        return mask.to(self._device)


def _concatenated_rows(groups: Sequence[Group], count: int) -> torch.Tensor:
    """The rows of each group, in a batch of `count` rows."""
    numbers = torch.arange(count)
    return torch.cat([numbers[each.rows] for each in groups])


def _as_slice(slots: torch.Tensor) -> slice:
    """The slice of slots that are neighbours."""
    return slice(int(slots[0]), int(slots[-1]) + 1)


def _are_neighbours(block_table: Sequence[int]) -> bool:
    return all(second == first + 1 for first, second in itertools.pairwise(block_table))


def _batches_by_length(
    spans: Sequence[tuple[int, torch.Tensor]],
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Batches of spans in which none is padded to more than twice its length."""
    batch: list[tuple[int, torch.Tensor]] = []
    for span in sorted(spans, key=lambda each: len(each[1]), reverse=True):
        if batch and 2 * len(span[1]) < len(batch[0][1]):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _pad(slots: torch.Tensor, length: int) -> torch.Tensor:
    """Repeats a slot of the same sequence: a NaN of another would spoil sums, masked or not."""
    return torch.cat([slots, slots[:1].expand(length - len(slots))])
