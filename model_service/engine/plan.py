"""What every rank must know of a step, and its form on the wire: one vector of 32-bit integers.

The leader makes it, the followers rebuild it; no pickles, and nothing that a rank can work out for
itself (positions and cache slots follow from lengths and block tables).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model_service.model.attention import SequenceSpan

Vector = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over a flat batch."""

    spans: tuple[SequenceSpan, ...]
    tokens: Vector  # [num_tokens], the spans' tokens one after the other
    logit_rows: Vector  # [num_logits], indices into tokens

    @property
    def positions(self) -> NDArray[np.int64]:
        """Position of each token in its own sequence [num_tokens]."""
        lengths = np.array([span.query_length for span in self.spans])
        ends = np.array([span.context_length for span in self.spans])
        return np.repeat(ends - lengths.cumsum(), lengths) + np.arange(len(self.tokens))

    def encode(self) -> Vector:
        """Three counts, three numbers per span, then tokens, logit rows and block tables."""
        header = [len(self.spans), len(self.tokens), len(self.logit_rows)]
        for span in self.spans:
            header += (span.query_length, span.context_length, len(span.block_table))
        # One conversion of all tables: one each would cost more than the rest together.
        tables = [block for span in self.spans for block in span.block_table]
        numbers = np.array(header + tables, dtype=np.int32)
        head, tail = np.split(numbers, [len(header)])
        return np.concatenate([head, self.tokens, self.logit_rows, tail])

    @classmethod
    def decode(cls, vector: Vector) -> Self:
        """The plan that `encode` gave `vector` for."""
        num_spans, num_tokens, num_logits = (int(count) for count in vector[:3])
        lengths = vector[3 : 3 + 3 * num_spans].reshape(-1, 3).tolist()
        rest = vector[3 + 3 * num_spans :]
        tokens, logit_rows, tables = np.split(rest, [num_tokens, num_tokens + num_logits])
        spans = []
        for query_length, context_length, blocks in lengths:
            spans.append(SequenceSpan(query_length, context_length, tables[:blocks].tolist()))
            tables = tables[blocks:]
        return cls(tuple(spans), tokens, logit_rows)
