from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_service.model.attention.backend import SequenceSpan
from model_service.model.attention.page_tables import leading_decodes, page_tables


@st.composite
def batches(draw: Any) -> tuple[list[SequenceSpan], int]:
    size = draw(st.integers(1, 6))
    spans = []
    for _ in range(draw(st.integers(1, 6))):
        query, before = draw(st.integers(1, 9)), draw(st.integers(0, 20))
        needed = -(-(query + before) // size)
        table = draw(st.lists(st.integers(0, 99), min_size=needed, max_size=needed + 3))
        spans.append(SequenceSpan(query, before + query, table))
    return spans, size


def slots_of(span: SequenceSpan, size: int) -> list[int]:
    """Where a span's new tokens lie, one by one."""
    positions = range(span.context_length - span.query_length, span.context_length)
    return [span.block_table[p // size] * size + p % size for p in positions]


@given(batches())
def test_each_token_lies_where_its_block_table_says(batch: tuple[list[SequenceSpan], int]) -> None:
    spans, size = batch
    slots = page_tables(spans, size).slots
    assert slots.tolist() == [slot for span in spans for slot in slots_of(span, size)]


@given(batches())
def test_vectors_tell_each_span_apart(batch: tuple[list[SequenceSpan], int]) -> None:
    spans, size = batch
    tables = page_tables(spans, size)
    for i, span in enumerate(spans):
        begin, end = tables.page_starts[i : i + 2]
        used = -(-span.context_length // size)
        assert tables.pages[begin:end].tolist() == list(span.block_table[:used])
        assert (end - begin - 1) * size + tables.last_page_lengths[i] == span.context_length
        assert 1 <= tables.last_page_lengths[i] <= size
        assert tables.query_starts[i + 1] - tables.query_starts[i] == span.query_length
    assert tables.context_lengths.tolist() == [span.context_length for span in spans]


@pytest.mark.parametrize(
    ("lengths", "decodes"), [([1, 1, 3], 2), ([2, 1], 0), ([1, 1], 2), ([1, 4, 1], 1)]
)
def test_only_the_first_spans_of_one_token_count_as_decode(
    lengths: list[int], decodes: int
) -> None:
    assert leading_decodes([SequenceSpan(length, 9, (1, 2)) for length in lengths]) == decodes
