"""The plan of a step, which every rank executes, and its form on the wire: 32-bit integers.

The leader encodes it, and the followers decode it; no pickles. A plan holds nothing that a rank can
work out itself: positions and cache slots follow from lengths and block tables. Only blocks that
the last plan did not have are sent.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_service.model.attention.backend import BlockCopy, SequenceSpan

Vector = NDArray[np.int32]

_COUNTS = 5  # at the vector's beginning
_PER_SPAN = 4


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over a flat batch."""

    spans: tuple[SequenceSpan, ...]
    tokens: Vector  # [num_tokens], the spans' tokens one after the other; some may be pending
    logit_rows: Vector  # [num_logits], indices into tokens
    num_sampled: int = 0  # that the leader samples and gives to all ranks
    copies: tuple[BlockCopy, ...] = ()  # to be made before anything is written

    @property
    def positions(self) -> NDArray[np.int64]:
        """Position of each token in its own sequence [num_tokens]."""
        lengths = np.array([span.query_length for span in self.spans])
        ends = np.array([span.context_length for span in self.spans])
        return np.repeat(ends - lengths.cumsum(), lengths) + np.arange(len(self.tokens))


class PlanEncoder:
    """The leader's end of the wire. It recognizes a block table by the list's identity."""

    def __init__(self) -> None:
        # By the identity of each table in the last plan: its index there, and its length then.
        self._known: dict[int, tuple[int, int]] = {}
        self._held: list[Sequence[int]] = []  # so that no other list takes over an identity

    def encode(self, plan: StepPlan) -> Vector:
        """Five counts, four numbers per span, two per copy; tokens, logit rows and new blocks."""
        spans, copies = plan.spans, plan.copies
        header = [len(spans), len(copies), len(plan.tokens), len(plan.logit_rows), plan.num_sampled]
        blocks: list[int] = []
        known: dict[int, tuple[int, int]] = {}
        held = [span.block_table for span in spans]
        for index, span in enumerate(spans):
            table = held[index]
            identity, length = id(table), len(table)
            before, sent = self._known.get(identity, (-1, 0))
            header += (span.query_length, span.context_length, before, length - sent)
            if length > sent:
                blocks += table[sent:]
            known[identity] = index, length
        self._known, self._held = known, held
        header += itertools.chain.from_iterable(copies)
        # One conversion for all lists: one for each would cost more than all the rest.
        numbers = np.array(header + blocks, dtype=np.int32)
        begin = len(header)
        return np.concatenate([numbers[:begin], plan.tokens, plan.logit_rows, numbers[begin:]])


class PlanDecoder:
    """A follower's end of the wire."""

    def __init__(self) -> None:
        self._tables: list[list[int]] = []  # of the last plan's spans

    def decode(self, vector: Vector) -> StepPlan:
        """The plan that was encoded as `vector`. Every plan must be decoded, in order."""
        num_spans, num_copies, num_tokens, num_logits, num_sampled = vector[:_COUNTS].tolist()
        sizes = [_PER_SPAN * num_spans, 2 * num_copies, num_tokens, num_logits]
        parts = np.split(vector[_COUNTS:], np.cumsum(sizes))
        header = parts[0].reshape(-1, _PER_SPAN).tolist()
        copies = tuple(BlockCopy(*copy) for copy in parts[1].reshape(-1, 2).tolist())
        tokens, logit_rows, blocks = parts[2:]
        spans: list[SequenceSpan] = []
        tables: list[list[int]] = []
        for query_length, context_length, before, count in header:
            table = self._tables[before] if before >= 0 else []
            table += blocks[:count].tolist()
            blocks = blocks[count:]
            tables.append(table)
            spans.append(SequenceSpan(query_length, context_length, table))
        self._tables = tables
        return StepPlan(tuple(spans), tokens, logit_rows, num_sampled, copies)
