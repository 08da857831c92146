"""A step's calls to scaled_dot_product_attention: the blocks that are read in place or copied."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model_service.model.attention.backend import SequenceSpan
from model_service.model.attention.sdpa_call import Group

# Below this many tokens, copying a span beside others costs less than a call of its own.
_MIN_TOKENS_IN_PLACE = 256


@dataclass(frozen=True, slots=True)
class SdpaPlan:
    """The calls that every layer of a step makes."""

    groups: list[Group]
    # The batch's row of each token in all groups; None if each row is in one group.
    part_rows: torch.Tensor | None
    new_slots: torch.Tensor  # of the step's tokens in the cache [tokens]


class SdpaPlanner:
    """Plans steps for a cache on `device`, for queries of `dtype`."""

    def __init__(
        self, block_size: int, dtype: torch.dtype, device: torch.device, *, min_run: float
    ) -> None:
        """`min_run` is how many tokens a run of neighbouring blocks needs to be read in place."""
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._min_run = min_run
        self._no_slots = torch.empty(0, dtype=torch.long, device=device)

    def plan(self, spans: Sequence[SequenceSpan]) -> SdpaPlan:
        """The groups of a step with these spans, in the order of the batch's rows."""
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
        groups += [self._padded(batch) for batch in _batches_by_length(copied)]
        return SdpaPlan(
            groups=groups,
            part_rows=_concatenated_rows(groups, row) if parts else None,
            new_slots=torch.cat(new_slots).to(self._device) if new_slots else self._no_slots,
        )

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
