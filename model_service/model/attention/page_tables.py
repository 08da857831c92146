"""The index vectors that paged attention kernels read, from the sequences of a step.

The vectors are FlashInfer's page table format: compressed rows over all block tables. They are
computed once per step on the host, in numpy and in one pass over the spans, while the device works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from model_service.model.attention.backend import SequenceSpan

Indices = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PageTables:
    """The spans of a flat batch, as vectors."""

    query_starts: Indices  # [spans + 1], where each span's tokens begin in the flat batch
    context_lengths: Indices  # [spans], tokens in the cache after this step
    page_starts: Indices  # [spans + 1], where each span's blocks begin in `pages`
    pages: Indices  # [sum of blocks], the blocks that hold each span's context, in order
    last_page_lengths: Indices  # [spans], tokens in each span's last block: 1 to block_size
    slots: Indices  # [tokens], where each token of the batch lies in the cache


def page_tables(spans: Sequence[SequenceSpan], block_size: int) -> PageTables:
    """The vectors of a step; a block table may be longer than its context needs."""
    count = len(spans)
    lengths = np.fromiter((span.query_length for span in spans), np.int32, count)
    contexts = np.fromiter((span.context_length for span in spans), np.int32, count)
    used = -(-contexts // block_size)
    query_starts, page_starts = _starts(lengths), _starts(used)
    tables = (span.block_table[:blocks] for span, blocks in zip(spans, used.tolist(), strict=True))
    pages = np.fromiter(chain.from_iterable(tables), np.int32, int(page_starts[-1]))
    tokens = np.arange(query_starts[-1], dtype=np.int32)
    positions = np.repeat(contexts - query_starts[1:], lengths) + tokens
    own = np.repeat(page_starts[:-1], lengths) + positions // block_size
    return PageTables(
        query_starts=query_starts,
        context_lengths=contexts,
        page_starts=page_starts,
        pages=pages,
        last_page_lengths=contexts - (used - 1) * block_size,
        slots=pages[own] * block_size + positions % block_size,
    )


def leading_decodes(spans: Sequence[SequenceSpan]) -> int:
    """The number of spans at the front that have one token, which a decode kernel can serve."""
    for index, span in enumerate(spans):
        if span.query_length != 1:
            return index
    return len(spans)


def query_tiles(tables: PageTables, tokens: int) -> Indices:
    """The spans cut into tiles of at most `tokens` tokens, [tiles, 4].

    Each tile's first token in the flat batch, its tokens, the tokens of the context that the first
    one sees, and where the span's blocks begin in `pages`.
    """
    lengths = np.diff(tables.query_starts)
    counts = -(-lengths // tokens)
    ends = np.cumsum(counts, dtype=np.int32)
    span = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    before = (np.arange(len(span), dtype=np.int32) - (ends - counts)[span]) * tokens
    return np.stack(
        (
            tables.query_starts[:-1][span] + before,
            np.minimum(lengths[span] - before, tokens),
            (tables.context_lengths - lengths)[span] + before + 1,
            tables.page_starts[:-1][span],
        ),
        axis=1,
    ).astype(np.int32)


def _starts(lengths: Indices) -> Indices:
    """The offsets of parts of these lengths in a row, and the end of the last one."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts
