"""Attention over the paged KV cache, behind one small interface.

A backend owns the cache of its rank. `plan` is called once per step with the sequences of the flat
batch, `attend` once per layer: it writes the new keys and values, then attends over block tables.
`SdpaAttention` is the reference that other backends are tested against.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

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


@dataclass(frozen=True, slots=True)
class _Group:
    """Spans that one call of scaled_dot_product_attention serves: one, or many of one token."""

    rows: slice | torch.Tensor  # of the flat batch: [tokens], span after span
    spans: int
    # Where keys and values lie: [spans × longest] slots, or a slice where one span's blocks are
    # neighbours, which is read in place.
    slots: slice | torch.Tensor
    # Added to the scores: [spans, 1, tokens of a span, longest]. None: all is seen.
    mask: torch.Tensor | None
    causal: bool = False


# Copying fewer tokens than this costs less than a call of its own.
_COPIED_TOKENS = 256
# Up to so many tokens of a span, reading each key once for all heads that share it saves more than
# a mask with a row for each of these heads costs.
_FEW_TOKENS = 16


class SdpaAttention:
    """PyTorch's scaled_dot_product_attention on any device.

    The query heads that share keys and values are laid out so that these are never repeated: as
    rows of one matrix where a span has few tokens, as heads with a common key (stride 0) where it
    has more. A longer sequence whose blocks are neighbours is attended in place. Others are copied
    into a buffer that all layers use, those of one token (decode) together, padded to the longest.
    """

    def __init__(
        self,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocates the cache; `kv_dtype` is how it holds keys and values, if not in `dtype`."""
        slots = shape.blocks * shape.block_size
        size = (shape.layers, slots, shape.kv_heads, shape.head_dim)
        self._kv_dtype = kv_dtype or dtype
        # Copying by indices is not there for 8-bit floats, but for bytes it is.
        held = torch.uint8 if self._kv_dtype.itemsize == 1 else self._kv_dtype
        # Not zeroed: nobody reads a slot before its token is written, and untouched memory is free.
        self._keys = torch.empty(size, dtype=held, device=device)
        self._values = torch.empty(size, dtype=held, device=device)
        # Where `_copied` puts keys and values; a new buffer in each layer would cost page faults.
        self._buffers = [torch.empty(0, *size[2:], dtype=held, device=device) for _ in range(2)]
        self._block_size = shape.block_size
        self._dtype = dtype
        self._device = device
        self._groups: list[_Group] = []
        self._new_slots = torch.empty(0, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        groups: list[_Group] = []
        new_slots: list[torch.Tensor] = []
        copied: list[tuple[int, torch.Tensor]] = []  # row, slots
        row = 0
        for span in spans:
            slots = self._slots(span)
            new_slots.append(slots[-span.query_length :])
            in_place = len(slots) >= _COPIED_TOKENS and _are_neighbours(span.block_table)
            if span.query_length == 1 and len(spans) > 1 and not in_place:
                copied.append((row, slots))
            else:
                groups.append(self._alone(span, row, slots))
            row += span.query_length
        self._groups = groups + [self._together(batch) for batch in _of_like_length(copied)]
        self._new_slots = torch.cat(new_slots).to(self._device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._new_slots, self._held(key))
        values.index_copy_(0, self._new_slots, self._held(value))
        output = torch.empty_like(query)
        for group in self._groups:
            if isinstance(group.slots, slice):
                selected = keys[group.slots], values[group.slots]
            else:
                selected = self._copied(keys, values, group.slots)
            key, value = (self._read(each) for each in selected)
            output[group.rows] = _attend(query[group.rows], key, value, group)
        return output

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return narrowed(x, self._kv_dtype).view(self._keys.dtype)

    def _read(self, held: torch.Tensor) -> torch.Tensor:
        return held.view(self._kv_dtype).to(self._dtype)

    def _copied(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._buffers[0]) < len(slots):
            self._buffers = [keys.new_empty(len(slots), *keys.shape[1:]) for _ in range(2)]
        key_buffer, value_buffer = (buffer[: len(slots)] for buffer in self._buffers)
        torch.index_select(keys, 0, slots, out=key_buffer)
        torch.index_select(values, 0, slots, out=value_buffer)
        return key_buffer, value_buffer

    def _slots(self, span: SequenceSpan) -> torch.Tensor:
        """Where the tokens of a sequence lie in the cache [context_length]."""
        first = torch.tensor(span.block_table, dtype=torch.long) * self._block_size
        slots = first.unsqueeze(1) + torch.arange(self._block_size)
        return slots.flatten()[: span.context_length]

    def _alone(self, span: SequenceSpan, row: int, slots: torch.Tensor) -> _Group:
        table = span.block_table
        first = table[0] * self._block_size
        place = slice(first, first + len(slots))
        whole = span.query_length == span.context_length
        return _Group(
            rows=slice(row, row + span.query_length),
            spans=1,
            slots=place if _are_neighbours(table) else slots.to(self._device),
            mask=None if whole or span.query_length == 1 else self._causal_mask(span),
            causal=whole and span.query_length > 1,
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

    def _causal_mask(self, span: SequenceSpan) -> torch.Tensor:
        """[1, 1, query_length, context_length]: a token at position p sees positions 0 to p."""
        positions = torch.arange(span.context_length - span.query_length, span.context_length)
        hidden = torch.arange(span.context_length) > positions.unsqueeze(1)
        return self._additive(hidden)[None, None]

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
        return mask.to(self._device)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: _Group
) -> torch.Tensor:
    """Attention of query [tokens, heads, head_dim] over [spans × longest, kv_heads, head_dim]."""
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
        attended = F.scaled_dot_product_attention(rows.flatten(2, 3), key, value, attn_mask=mask)
        return attended.view(rows.shape).transpose(1, 2).reshape(query.shape)
    # [kv_heads, heads that share, tokens, head_dim], the key of each with stride 0.
    rows = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    key, value = (
        each.transpose(0, 1).unsqueeze(1).expand(-1, rows.shape[1], -1, -1) for each in (key, value)
    )
    attended = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=group.mask, is_causal=group.causal
    )
    return attended.permute(2, 0, 1, 3).reshape(query.shape)


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
