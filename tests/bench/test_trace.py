import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.engine.trace import Span, Trace, record, short, trace_rows

# Two steps of two kernels; the first copy runs beside a kernel.
SPANS = [
    Span("gemm", 0, 40),
    Span("copy", 10, 20),
    Span("attention", 41, 60),
    Span("gemm", 65, 100),
    Span("attention", 100, 120),
]


def test_gaps_lie_where_nothing_runs() -> None:
    trace = Trace(SPANS, steps=2)
    assert trace.gaps() == [
        Span("gemm → attention", 40, 41),
        Span("attention → gemm", 60, 65),
    ]
    assert trace.seconds == pytest.approx(120e-6)
    assert trace.idle_share() == pytest.approx(6 / 120)
    assert trace.idle_share(trace.steps - 1) == pytest.approx(5 / 120)


def test_tables_name_kernels_with_their_time_per_step() -> None:
    rows = list(trace_rows(Trace(SPANS, steps=2), streams=1, step_seconds=50e-6))
    (idle,) = (row for row in rows if row.case == "device idle")
    assert idle.values["kernels_per_step"] == 2.5
    kernels = {str(row.settings["name"]): row.values for row in rows if row.case == "kernels"}
    assert list(kernels) == ["`gemm`", "`attention`", "`copy`"]
    assert kernels["`gemm`"] == {
        "per_step": 1.0,
        "us_per_step": 37.5,
        "percent_of_step": pytest.approx(62.5),
    }


def test_kernels_beyond_the_table_are_added_up() -> None:
    spans = [Span(f"kernel {number}", number, number + 1) for number in range(40)]
    rows = [row for row in trace_rows(Trace(spans, 1), 1, 1.0) if row.case == "kernels"]
    assert rows[-1].settings["name"] == "all others"
    assert sum(float(str(row.values["us_per_step"])) for row in rows) == 40


def test_names_of_templates_are_cut() -> None:
    assert short("void kernel<a|b>(int)") == "kernel<a/b>(int)"
    assert len(short("x" * 500)) == 90


LENGTHS = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100)), min_size=1, max_size=30)


@given(LENGTHS)
def test_busy_and_idle_time_are_the_whole(lengths: list[tuple[int, int]]) -> None:
    spans = sorted((Span("k", at, at + long) for at, long in lengths), key=lambda s: s.begin)
    trace = Trace(spans, steps=1)
    busy = len({moment for span in spans for moment in range(int(span.begin), int(span.end))})
    assert trace.idle_share() * trace.seconds * 1e6 == pytest.approx(
        trace.seconds * 1e6 - busy, abs=1e-6
    )


def test_what_the_profiler_sees_of_the_cpu_is_a_trace() -> None:
    x = torch.randn(64, 64)
    trace = record(lambda: x @ x, 3, torch.device("cpu"))
    assert trace.steps == 3
    assert any("mm" in span.name for span in trace.spans)
