import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report import (
    SCHEMA,
    Host,
    Recorder,
    Row,
    SkippedError,
    features,
    ratio,
    spread,
    table,
)

ROWS = (
    Row("decode", {"streams": 1}, {"tokens_per_s": 12.5}),
    Row("decode", {"streams": 8}, {"tokens_per_s": 1234.5, "cached": None}),
)
HOST = Host("AMD EPYC 9R14", 2, 16.0, ("avx2", "bf16"), "Linux")


def written(root: Path) -> Path:
    """The folder of a result with these rows."""
    details = {"shape": "tiny"}
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    recorder = Recorder(
        "engine", root, details, host=HOST, rows=[*ROWS], notes=["a note"], created=created
    )
    recorder.write()
    return recorder.folder


def test_result_file_says_what_where_and_with_which_versions(tmp_path: Path) -> None:
    document = json.loads((written(tmp_path) / "result.json").read_text())
    assert document["schema"] == SCHEMA
    assert document["host"]["features"] == ["avx2", "bf16"]
    assert {"python", "commit", "torch"} <= document["versions"].keys()
    assert document["rows"][0] == {
        "case": "decode",
        "settings": {"streams": 1},
        "values": {"tokens_per_s": 12.5},
    }
    about = {"kind", "details", "host", "versions", "command", "created", "schema"}
    assert document.keys() == {"rows", "notes", *about}


def test_page_has_machine_notes_and_a_table_per_case(tmp_path: Path) -> None:
    page = (written(tmp_path) / "result.md").read_text()
    assert "AMD EPYC 9R14, 2 cores (avx2, bf16)" in page
    assert "- a note" in page
    assert "## decode\n\n| streams | tokens per s | cached |" in page


def test_table_has_a_dash_for_what_was_not_measured() -> None:
    assert table(ROWS).splitlines()[2:] == ["| 1 | 12.5 | – |", "| 8 | 1234 | – |"]


def test_folder_is_named_after_date_and_machine(tmp_path: Path) -> None:
    assert written(tmp_path) == tmp_path / "2026-01-02-amd-epyc-9r14-2c-avx2-bf16/engine"


def test_features_are_read_from_flags_of_both_architectures() -> None:
    assert features(["fpu", "avx2", "avx512f", "avx512_bf16"]) == ("avx2", "avx512", "bf16")
    assert features(["asimd", "bf16", "i8mm"]) == ("bf16", "neon", "i8mm")


def test_variables_hold_the_host_to_older_instructions() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = cpuinfo.partition("flags\t\t: ")[2].partition("\n")[0].split()
    if "avx2" not in flags:
        pytest.skip("the variables are for x86 with AVX2")
    script = "from bench.report import read_host; print(read_host().features, read_host().unused)"
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    }
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert printed == f"{('avx2',)} {features(flags)[1:]}\n"


def test_page_names_what_the_host_was_held_from(tmp_path: Path) -> None:
    held = dataclasses.replace(HOST, unused=("vnni", "amx"))
    page = Recorder("engine", tmp_path, host=held).page()
    assert "2 cores (avx2, bf16; held from vnni and amx)" in page


def test_wide_type_is_bfloat16_only_in_hardware() -> None:
    assert HOST.wide_dtype == "bfloat16"
    assert dataclasses.replace(HOST, features=("avx2",)).wide_dtype == "float32"


def test_a_failing_case_is_noted_and_keeps_what_it_had(tmp_path: Path) -> None:
    def failing() -> Iterator[Row]:
        yield Row("first", {}, {"value": 1.0})
        raise RuntimeError("out of memory\nand so on")

    recorder = Recorder(
        "engine", tmp_path, part="7B", host=dataclasses.replace(HOST, device="NVIDIA H200")
    )
    recorder.attempt("some", failing)
    assert recorder.failed
    (file,) = tmp_path.glob("*-nvidia-h200/engine/7B/result.json")
    found = json.loads(file.read_text())
    assert [row["case"] for row in found["rows"]] == ["first"]
    assert found["notes"] == ["some: failed: RuntimeError: out of memory"]


def test_a_case_that_cannot_be_measured_is_no_failure(tmp_path: Path) -> None:
    def skipped() -> Iterator[Row]:
        raise SkippedError("needs CUDA")

    recorder = Recorder("engine", tmp_path)
    recorder.attempt("some", skipped)
    assert not recorder.failed
    assert recorder.notes == ["some: skipped: needs CUDA"]


def test_no_case_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    late = Recorder("engine", tmp_path, deadline=0.0)
    late.attempt("some", lambda: pytest.fail("begun"))
    assert "the time of this run was over" in late.notes[0]


VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1)


@given(VALUES)
def test_median_lies_between_lowest_and_highest(values: list[float]) -> None:
    columns = spread("ms", values)
    assert columns.keys() == {"ms", "ms_low", "ms_high"}
    assert min(values) == columns["ms_low"] <= columns["ms"] <= columns["ms_high"] == max(values)  # type: ignore[operator]


@given(VALUES, st.floats(0.1, 10))
def test_ratio_to_a_scaled_copy_is_the_scale(values: list[float], scale: float) -> None:
    assert ratio([scale * value for value in values], values) == pytest.approx(scale)


def test_one_outlier_moves_no_median() -> None:
    assert spread("ms", [1.0, 2.0, 3.0])["ms"] == spread("ms", [1.0, 2.0, 3000.0])["ms"]
