"""Attention by PyTorch's scaled_dot_product_attention: correct on any device, what the CPU has, and
the reference that other backends are tested against.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from model_service.model.attention.backend import (
    BlockCopy,
    CacheShape,
    SequenceSpan,
    copy_blocks,
    narrowed,
)

# Copying fewer tokens than this costs less than a call of its own.
_COPIED_TOKENS = 256
# Copying fewer bytes of keys and values costs less than a call and weighing what it makes.
_COPIED_BYTES = 4 * 2**20
# Up to so many tokens of a span, reading each key once for all heads that share it saves more than
# a mask with a row for each of these heads costs.
_FEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Group:
    """What one call attends to: keys of one span, or of many spans of one token."""

    rows: slice | torch.Tensor  # of the flat batch: [tokens], span after span
    spans: int
    # Where keys and values lie: [spans × longest] slots, or a slice, which is read in place.
    slots: slice | torch.Tensor
    # Added to the scores: [spans, 1, tokens of a span, longest]. None: all is seen.
    mask: torch.Tensor | None = None
    causal: bool = False


class SdpaAttention:
    """On any device, in any dtype.

    The query heads that share keys and values are laid out so that these are never repeated: as
    rows of one matrix where a span has few tokens, as heads with a common key (stride 0) where it
    has more.

    Long runs of neighbouring blocks are attended in place. What lies between them is copied into a
    buffer that all layers use, that of spans of one token (decode) together, padded to the longest.
    Where a span is attended to in parts, each is weighed by its sum of exponentials, as the blocks
    of FlashAttention are (Dao et al., 2022).
    """

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        copied_bytes: int = _COPIED_BYTES,
    ) -> None:
        """Allocates the cache.

        Args:
            shape: of the cache.
            dtype: of queries, keys and values.
            device: where.
            kv_dtype: how the cache holds keys and values, if not in `dtype`.
            copied_bytes: of keys and values; a run of neighbours that has fewer, beside other
                blocks of its span, is copied with them.
        """
        slots = shape.blocks * shape.block_size
        size = (shape.layers, slots, shape.kv_heads, shape.head_dim)
        self._kv_dtype = kv_dtype or dtype
        # Copying by indices is not there for 8-bit floats, but for bytes it is.
        held = torch.uint8 if self._kv_dtype.itemsize == 1 else self._kv_dtype
        # Not zeroed: nobody reads a slot before its token is written, and untouched memory is free.
        self._keys = torch.empty(size, dtype=held, device=device)
        self._values = torch.empty(size, dtype=held, device=device)
        # Where `_selected` copies to; a new buffer in each layer would cost page faults.
        self._buffers = [torch.empty(0, *size[2:], dtype=held, device=device) for _ in range(2)]
        self._block_size = shape.block_size
        self._dtype = dtype
        self._device = device
        self._least_run = copied_bytes / (2 * shape.kv_heads * shape.head_dim * held.itemsize)
        self._groups: list[_Group] = []
        # Of what the groups make, the rows of the batch; None where each row is made once.
        self._part_rows: torch.Tensor | None = None
        self._new_slots = torch.empty(0, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        groups: list[_Group] = []
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
                groups += (_Group(rows, spans=1, slots=_place(slots[run])) for run in runs)
                rest = torch.ones(len(slots), dtype=torch.bool)
                for run in runs:
                    rest[run] = False
            together = span.query_length == 1 and len(spans) > 1
            if together and not (neighbours and len(slots) >= _COPIED_TOKENS):
                copied.append((row, slots[rest]))
            else:
                place = _place(slots) if neighbours else slots[rest].to(self._device)
                groups.append(self._alone(span, rows, place, rest))
            row += span.query_length
        self._groups = groups + [self._together(batch) for batch in _of_like_length(copied)]
        self._part_rows = _rows(self._groups, row) if parts else None
        self._new_slots = torch.cat(new_slots).to(self._device)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for cache in (self._keys, self._values):
            blocks = cache.view(len(cache), -1, self._block_size, *cache.shape[2:])
            copy_blocks(blocks, copies)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new_slots, self._held(key))
        values.index_copy_(0, self._new_slots, self._held(value))
        output = torch.empty_like(query)
        parts: list[list[torch.Tensor]] = []
        for group in self._groups:
            key, value = (self._read(each) for each in self._selected(keys, values, group.slots))
            in_parts = self._part_rows is not None
            attended = _attend(query[group.rows], key, value, group, with_sums=in_parts)
            if in_parts:
                parts.append(attended)
            else:
                [output[group.rows]] = attended
        return output if self._part_rows is None else _weighed(parts, self._part_rows, output)

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return narrowed(x, self._kv_dtype).view(self._keys.dtype)

    def _read(self, held: torch.Tensor) -> torch.Tensor:
        return held.view(self._kv_dtype).to(self._dtype)

    def _selected(
        self, keys: torch.Tensor, values: torch.Tensor, slots: slice | torch.Tensor
    ) -> Sequence[torch.Tensor]:
        if isinstance(slots, slice):
            return keys[slots], values[slots]
        if len(self._buffers[0]) < len(slots):
            self._buffers = [keys.new_empty(len(slots), *keys.shape[1:]) for _ in range(2)]
        buffers = [buffer[: len(slots)] for buffer in self._buffers]
        for held, buffer in zip((keys, values), buffers, strict=True):
            torch.index_select(held, 0, slots, out=buffer)
        return buffers

    def _slots(self, span: SequenceSpan) -> torch.Tensor:
        """Where the tokens of a sequence lie in the cache [context_length]."""
        first = torch.tensor(span.block_table, dtype=torch.long) * self._block_size
        slots = first.unsqueeze(1) + torch.arange(self._block_size)
        return slots.flatten()[: span.context_length]

    def _long_runs(self, span: SequenceSpan) -> list[slice]:
        """Of a span whose blocks are not all neighbours, the tokens that are attended in place.

        They are older than the step's own, which alone may not see all.
        """
        if span.context_length < self._least_run or self._device.type != "cpu":
            return []
        table, older = span.block_table, span.context_length - span.query_length
        breaks = [at for at in range(1, len(table)) if table[at] != table[at - 1] + 1]
        runs = [
            slice(first * self._block_size, min(end * self._block_size, older))
            for first, end in itertools.pairwise([0, *breaks, len(table)])
        ]
        return [run for run in runs if run.stop - run.start >= self._least_run]

    def _alone(
        self,
        span: SequenceSpan,
        rows: slice,
        place: slice | torch.Tensor,
        rest: slice | torch.Tensor,
    ) -> _Group:
        """A span, or what is left of it: `rest` of its tokens, which lie at `place`."""
        whole = span.query_length == span.context_length
        several = span.query_length > 1
        return _Group(
            rows=rows,
            spans=1,
            slots=place,
            mask=self._causal_mask(span, rest) if several and not whole else None,
            causal=whole and several,
        )

    def _together(self, batch: Sequence[tuple[int, torch.Tensor]]) -> _Group:
        rows, slots = zip(*batch, strict=True)
        lengths = torch.tensor([len(each) for each in slots])
        longest = int(lengths.max())
        padding = torch.arange(longest) >= lengths.unsqueeze(1)
        return _Group(
            rows=torch.tensor(rows, device=self._device),
            spans=len(batch),
            slots=torch.cat([_padded(each, longest) for each in slots]).to(self._device),
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


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: _Group, *, with_sums: bool
) -> list[torch.Tensor]:
    """Attention of query [tokens, heads, head_dim] over [spans × longest, kv_heads, head_dim].

    Returns:
        [tokens, heads, head_dim], and if asked for the logarithms of the sums of exponentials
        [tokens, heads, 1].
    """
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if tokens <= group.spans * _FEW_TOKENS and not group.causal:
        # [spans, kv_heads, tokens of a span × heads that share, head_dim]
        sharing = heads // kv_heads
        rows = query.view(group.spans, -1, kv_heads, sharing, head_dim).transpose(1, 2)
        key, value = (
            each.view(group.spans, -1, kv_heads, head_dim).transpose(1, 2) for each in (key, value)
        )
        mask = group.mask
        if mask is not None:
            mask = mask.unsqueeze(3).expand(-1, -1, -1, sharing, -1).flatten(2, 3)
        made = _kernel(rows.flatten(2, 3), key, value, mask, with_sums=with_sums)
        made = [each.view(*rows.shape[:-1], -1).transpose(1, 2) for each in made]
    else:
        # [kv_heads, heads that share, tokens, head_dim], the key of each with stride 0.
        rows = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        key, value = (
            each.transpose(0, 1).unsqueeze(1).expand(-1, rows.shape[1], -1, -1)
            for each in (key, value)
        )
        made = _kernel(rows, key, value, group.mask, causal=group.causal, with_sums=with_sums)
        made = [each.permute(2, 0, 1, 3) for each in made]
    return [each.reshape(tokens, heads, -1) for each in made]


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
    with_sums: bool,
) -> list[torch.Tensor]:
    """scaled_dot_product_attention of [..., tokens, head_dim].

    It does not tell the sums; the kernel that it takes on the CPU does.
    """
    if not with_sums:
        return [F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    attended, sums = kernel(query, key, value, attn_mask=mask, is_causal=causal)
    return [attended, sums.unsqueeze(-1)]


def _weighed(
    parts: Sequence[Sequence[torch.Tensor]], rows: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Attention to all parts together.

    Args:
        parts: attention [tokens, heads, head_dim] and sums [tokens, heads, 1] of each.
        rows: of the batch, of all parts' tokens, one after the other.
        like: [tokens of the batch, heads, head_dim].
    """
    attended, sums = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = like.shape[0], *sums.shape[1:]
    index = rows.view(-1, 1, 1).expand_as(sums)
    largest = sums.new_full(shape, -torch.inf).scatter_reduce_(0, index, sums, "amax")
    weights = (sums - largest[rows]).exp()
    total = weights.new_zeros(shape).index_add_(0, rows, weights)
    weighed = weights.new_zeros(like.shape).index_add_(0, rows, attended * weights)
    return (weighed / total).to(like.dtype)


def _rows(groups: Sequence[_Group], count: int) -> torch.Tensor:
    """Of the batch's `count` rows, those of each group, one after the other."""
    numbers = torch.arange(count)
    return torch.cat([numbers[each.rows] for each in groups])


def _place(slots: torch.Tensor) -> slice:
    """Of slots that are neighbours."""
    return slice(int(slots[0]), int(slots[-1]) + 1)


def _are_neighbours(block_table: Sequence[int]) -> bool:
    return all(second == first + 1 for first, second in itertools.pairwise(block_table))


def _of_like_length(
    spans: Sequence[tuple[int, torch.Tensor]],
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Spans in batches in which none is padded to more than twice its length."""
    batch: list[tuple[int, torch.Tensor]] = []
    for span in sorted(spans, key=lambda each: len(each[1]), reverse=True):
        if batch and 2 * len(span[1]) < len(batch[0][1]):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _padded(slots: torch.Tensor, length: int) -> torch.Tensor:
    """Repeats a slot of the same sequence: a masked NaN still spoils a sum, so never another's."""
    return torch.cat([slots, slots[:1].expand(length - len(slots))])
