"""Attention over the paged KV cache, behind one small interface.

A backend owns the cache of its rank. `plan` is called once per step with the sequences of the flat
batch, `attend` once per layer: it writes the new keys and values, then attends over block tables.
`SdpaAttention` is the reference that other backends are tested against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F


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

        Args:
            layer: whose part of the cache.
            query: [num_tokens, heads, head_dim].
            key: [num_tokens, kv_heads, head_dim], like value.
            value: what attention mixes.

        Returns:
            [num_tokens, heads, head_dim].
        """


@dataclass(frozen=True, slots=True)
class _Group:
    """Spans that one call of scaled_dot_product_attention serves."""

    rows: torch.Tensor  # [spans, query_length] into the flat batch
    slots: torch.Tensor  # [spans, context_length] into the cache, padded with a slot of its own
    mask: torch.Tensor  # [spans, 1, query_length, context_length], True: attend


class SdpaAttention:
    """PyTorch's scaled_dot_product_attention on any device.

    Spans of one token (decode) go through one call, padded to the longest context; each longer span
    (prefill) has a call of its own.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        slots = shape.blocks * shape.block_size
        size = (shape.layers, slots, shape.kv_heads, shape.head_dim)
        self._keys = torch.zeros(size, dtype=dtype, device=device)
        self._values = torch.zeros(size, dtype=dtype, device=device)
        self._block_size = shape.block_size
        self._device = device
        self._groups: list[_Group] = []
        self._new_slots = torch.empty(0, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + span.query_length)
        slots = [self._slots(span) for span in spans]
        new = [s[-span.query_length :] for s, span in zip(slots, spans, strict=True)]
        self._new_slots = torch.cat(new).to(self._device)
        single = [i for i, span in enumerate(spans) if span.query_length == 1]
        members = ([single] if single else []) + [
            [i] for i, span in enumerate(spans) if span.query_length > 1
        ]
        self._groups = [
            self._group(
                [spans[i] for i in group], [starts[i] for i in group], [slots[i] for i in group]
            )
            for group in members
        ]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._keys[layer], self._values[layer]
        keys[self._new_slots] = key
        values[self._new_slots] = value
        output = torch.empty_like(query)
        for group in self._groups:
            # SDPA wants heads before tokens: [spans, heads, tokens, head_dim]
            attended = F.scaled_dot_product_attention(
                query[group.rows].transpose(1, 2),
                keys[group.slots].transpose(1, 2),
                values[group.slots].transpose(1, 2),
                attn_mask=group.mask,
                enable_gqa=True,
            )
            output[group.rows] = attended.transpose(1, 2)
        return output

    def _slots(self, span: SequenceSpan) -> torch.Tensor:
        """Where the tokens of a sequence lie in the cache [context_length]."""
        first = torch.tensor(span.block_table, dtype=torch.long) * self._block_size
        slots = first.unsqueeze(1) + torch.arange(self._block_size)
        return slots.flatten()[: span.context_length]

    def _group(
        self, spans: Sequence[SequenceSpan], starts: Sequence[int], slots: Sequence[torch.Tensor]
    ) -> _Group:
        queries = spans[0].query_length
        longest = max(span.context_length for span in spans)
        lengths = torch.tensor([span.context_length for span in spans])
        # A token at position p sees positions 0 to p; padding lies behind every p.
        positions = lengths.unsqueeze(1) - queries + torch.arange(queries)
        mask = torch.arange(longest) <= positions.unsqueeze(-1)
        return _Group(
            rows=(torch.tensor(starts).unsqueeze(1) + torch.arange(queries)).to(self._device),
            slots=torch.stack([_padded(s, longest) for s in slots]).to(self._device),
            mask=mask.unsqueeze(1).to(self._device),
        )


def _padded(slots: torch.Tensor, length: int) -> torch.Tensor:
    """Repeats a slot of the same sequence: a masked NaN still spoils a sum, so never another's."""
    return torch.cat([slots, slots[:1].expand(length - len(slots))])
