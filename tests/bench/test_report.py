import dataclasses
import json
from pathlib import Path

from bench.host import Host, features
from bench.report import SCHEMA, Report, Row, make_report, result_folder, table, write_report

ROWS = (
    Row("decode", {"streams": 1}, {"tokens_per_s": 12.5}),
    Row("decode", {"streams": 8}, {"tokens_per_s": 1234.5, "cached": None}),
)
HOST = Host("AMD EPYC 9R14", 2, 16.0, ("avx2", "bf16"), "Linux")


def report(rows: tuple[Row, ...] = ROWS) -> Report:
    return dataclasses.replace(
        make_report("engine", rows, ["a note"], {"shape": "tiny"}), host=HOST
    )


def test_result_file_says_what_where_and_with_which_versions(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["schema"] == SCHEMA
    assert document["host"]["features"] == ["avx2", "bf16"]
    assert {"python", "commit", "torch"} <= document["versions"].keys()
    assert document["rows"][0] == {
        "case": "decode",
        "settings": {"streams": 1},
        "values": {"tokens_per_s": 12.5},
    }
    assert document.keys() == {field.name for field in dataclasses.fields(Report)}


def test_page_has_machine_notes_and_a_table_per_case(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    page = (tmp_path / "result.md").read_text()
    assert "AMD EPYC 9R14, 2 cores (avx2, bf16)" in page
    assert "- a note" in page
    assert "## decode\n\n| streams | tokens per s | cached |" in page


def test_table_has_a_dash_for_what_was_not_measured() -> None:
    rows = [{**row.settings, **row.values} for row in ROWS]
    assert table(rows).splitlines()[2:] == ["| 1 | 12.5 | – |", "| 8 | 1234 | – |"]


def test_folder_is_named_after_date_and_machine() -> None:
    folder = result_folder(dataclasses.replace(report(), created="2026-01-02T03:04:05"), Path("r"))
    assert folder == Path("r/2026-01-02-amd-epyc-9r14-2c-avx2-bf16/engine")


def test_features_are_read_from_flags_of_both_architectures() -> None:
    assert features(["fpu", "avx2", "avx512f", "avx512_bf16"]) == ("avx2", "avx512", "bf16")
    assert features(["asimd", "bf16", "i8mm"]) == ("bf16", "neon", "i8mm")


def test_wide_type_is_bfloat16_only_in_hardware() -> None:
    assert HOST.wide_dtype == "bfloat16"
    assert dataclasses.replace(HOST, features=("avx2",)).wide_dtype == "float32"
