import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model_service.engine.plan import StepPlan
from model_service.model.attention import SequenceSpan

spans = st.builds(
    lambda query, before, blocks: SequenceSpan(query, before + query, tuple(blocks)),
    st.integers(1, 5),
    st.integers(0, 9),
    st.lists(st.integers(1, 1000), max_size=6),
)


@given(st.lists(spans, max_size=6), st.data())
def test_a_plan_survives_the_wire(spans: list[SequenceSpan], data: st.DataObject) -> None:
    count = sum(span.query_length for span in spans)
    tokens = data.draw(st.lists(st.integers(0, 31999), min_size=count, max_size=count))
    rows = data.draw(st.lists(st.integers(0, max(0, count - 1)), max_size=count))
    plan = StepPlan(tuple(spans), np.array(tokens, np.int32), np.array(rows, np.int32))
    decoded = StepPlan.decode(plan.encode())
    assert [
        (span.query_length, span.context_length, tuple(span.block_table)) for span in decoded.spans
    ] == [(span.query_length, span.context_length, span.block_table) for span in spans]
    assert decoded.tokens.tolist() == tokens
    assert decoded.logit_rows.tolist() == rows


def test_positions_are_those_of_each_sequence() -> None:
    spans = (SequenceSpan(1, 7, (1,)), SequenceSpan(3, 5, (2,)))
    plan = StepPlan(spans, np.zeros(4, np.int32), np.zeros(0, np.int32))
    assert plan.positions.tolist() == [6, 2, 3, 4]
