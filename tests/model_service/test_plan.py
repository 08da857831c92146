import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.step.plan import PlanDecoder, PlanEncoder, StepPlan
from model_service.model.attention.backend import BlockCopy, SequenceSpan

blocks = st.integers(1, 1000)


def values(plan: StepPlan) -> tuple[object, ...]:
    """All that a plan says, in types that compare."""
    spans = [
        (span.query_length, span.context_length, tuple(span.block_table)) for span in plan.spans
    ]
    return spans, plan.tokens.tolist(), plan.logit_rows.tolist(), plan.num_sampled, plan.copies


@st.composite
def plans(choose: st.DrawFn, tables: list[list[int]]) -> StepPlan:
    """A plan over some of `tables`, in any order, which grow."""
    spans = []
    for table in choose(st.permutations(tables))[: choose(st.integers(0, len(tables)))]:
        table.extend(choose(st.lists(blocks, max_size=3)))
        query, before = choose(st.integers(1, 5)), choose(st.integers(0, 9))
        spans.append(SequenceSpan(query, before + query, table))
    count = sum(span.query_length for span in spans)
    tokens = choose(st.lists(st.integers(-300, 31999), min_size=count, max_size=count))
    rows = choose(st.lists(st.integers(0, max(0, count - 1)), max_size=count))
    vectors = np.array(tokens, np.int32), np.array(rows, np.int32)
    copies = choose(st.lists(st.builds(BlockCopy, blocks, blocks), max_size=3))
    return StepPlan(
        tuple(spans), *vectors, num_sampled=choose(st.integers(0, 300)), copies=tuple(copies)
    )


@settings(max_examples=30)
@given(st.data())
def test_plans_survive_the_wire_while_sequences_come_grow_and_go(data: st.DataObject) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    tables: list[list[int]] = [[] for _ in range(5)]
    for _ in range(6):
        tables[data.draw(st.integers(0, 4))] = []  # another sequence
        plan = data.draw(plans(tables))
        assert values(decoder.decode(encoder.encode(plan))) == values(plan)


def test_blocks_that_the_last_plan_had_are_not_sent_again() -> None:
    encoder, table = PlanEncoder(), [*range(1, 200)]
    plan = StepPlan((SequenceSpan(1, 9, table),), np.zeros(1, np.int32), np.zeros(1, np.int32))
    assert len(encoder.encode(plan)) > 199
    table.append(7)
    assert len(encoder.encode(plan)) == 5 + 4 + 1 + 1 + 1


def test_positions_are_those_of_each_sequence() -> None:
    spans = (SequenceSpan(1, 7, (1,)), SequenceSpan(3, 5, (2,)))
    plan = StepPlan(spans, np.zeros(4, np.int32), np.zeros(0, np.int32))
    assert plan.positions.tolist() == [6, 2, 3, 4]
