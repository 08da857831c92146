from pathlib import Path

import pytest

from bench.report import Report, Row, make_report

pytest.importorskip("matplotlib")

from bench.engine.plots import plot_baselines, plot_engine  # needs matplotlib

PNG = b"\x89PNG"


def report(*rows: Row) -> Report:
    return make_report("engine", rows, [], {"shape": "tiny"})


def test_each_case_that_was_measured_gets_a_plot(tmp_path: Path) -> None:
    decode = [
        Row("decode", {"precision": "int8", "streams": n}, _rate(10.0 * n)) for n in (1, 8, 64)
    ]
    turns = [
        Row(
            "dialog",
            {"precision": "int8", "prefix_cache": cache, "turn": turn},
            {"first_token_ms": 5.0},
        )
        for cache in ("True", "False")
        for turn in (1, 2)
    ]
    stall = Row("stall", {"precision": "int8", "chunks": "whole"}, {"longest_gap_over_step": 9.0})
    files = plot_engine(report(*decode, *turns, stall), tmp_path)
    assert [file.name for file in files] == ["decode.png", "dialog.png", "stall.png"]
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_contenders_get_a_plot_per_case_and_other_tables_none(tmp_path: Path) -> None:
    rows = [
        Row("decode-8", {"contender": name}, _rate(rate))
        for name, rate in (("chasqui-int8", 9.0), ("llama.cpp-q8_0", 8.0))
    ]
    other = Row("not measured", {"contender": "vllm"}, {"reason": "died"})
    assert plot_baselines(report(*rows, other), tmp_path) == [tmp_path / "decode-8.png"]


def _rate(median: float) -> dict[str, float]:
    return {
        "tokens_per_s": median,
        "tokens_per_s_low": median - 1,
        "tokens_per_s_high": median + 1,
    }
