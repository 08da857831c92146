"""Result files, a folder per kind, date and machine: JSON for programs, Markdown for people.

The JSON is the record; the Markdown and the plots are drawn from it alone.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.host import Host, read_host, versions

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result table: what was measured, under which settings, and what came out."""

    case: str
    settings: Mapping[str, Value]
    values: Mapping[str, Value]  # names end in the unit


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run found out."""

    kind: str  # engine or baselines
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what could not be measured, and why
    details: Mapping[str, object]  # what only this kind has
    host: Host
    versions: Mapping[str, str]
    command: tuple[str, ...]
    created: str  # ISO 8601, UTC
    schema: int = SCHEMA


def make_report(
    kind: str, rows: Iterable[Row], notes: Iterable[str], details: Mapping[str, object]
) -> Report:
    """A report of this run on this machine."""
    return Report(
        kind=kind,
        rows=tuple(rows),
        notes=tuple(notes),
        details=details,
        host=read_host(),
        versions=versions(),
        command=("python", "-m", f"bench.{kind}", *sys.argv[1:]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def result_folder(report: Report, root: Path = RESULTS) -> Path:
    """Where a report belongs: `<root>/<date>-<processor, cores and features>/<kind>`."""
    return root / f"{report.created[:10]}-{report.host.slug}" / report.kind


def write_report(report: Report, folder: Path) -> None:
    """Writes `result.json` and `result.md`; an earlier result in the folder is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
    (folder / "result.json").write_text(document + "\n", encoding="utf-8")
    (folder / "result.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """The report as a page: machine, versions, notes, and a table per case."""
    host = report.host
    parts = [
        f"# {report.kind.capitalize()} benchmark, {report.created[:10]}",
        f"{host.processor}, {host.cores} cores ({', '.join(host.features)}), "
        f"{host.memory_gib:g} GiB, {host.system}.",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "`" + " ".join(report.command) + "`",
        *(f"- {note}" for note in report.notes),
    ]
    for case in dict.fromkeys(row.case for row in report.rows):
        rows = [{**row.settings, **row.values} for row in report.rows if row.case == case]
        parts += [f"## {case}", table(rows)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Value]]) -> str:
    """A Markdown table with the union of the rows' columns, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows)
    return "\n".join(lines)


def line(row: Row) -> str:
    """A row on one line, for whoever watches a run."""
    pairs = {**row.settings, **row.values}.items()
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)
    return f"{row.case}: {', '.join(shown)}"


def _cell(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
