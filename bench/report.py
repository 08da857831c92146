"""Results: rows, the machine they were measured on, and the files they are written to.

A run writes `result.json`, the record, and `result.md`, the same rows as tables, after every case.
So a run that is cut off loses one case, and a case that fails is a note in the result and not the
end of the run.
"""

import dataclasses
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch

from serving.errors import StartError

SCHEMA = 2
RESULTS = Path(__file__).parent / "results"
WORK_DIR = Path.home() / ".cache" / "chasqui-bench"  # checkpoints, exports, environments
# Name in results: flags of which the processor must have one (Linux's names, x86 and Arm).
FEATURES: Mapping[str, frozenset[str]] = {
    "avx2": frozenset({"avx2"}),
    "avx512": frozenset({"avx512f"}),
    "vnni": frozenset({"avx512_vnni", "avx_vnni"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "amx": frozenset({"amx_tile"}),
    "neon": frozenset({"asimd"}),
    "i8mm": frozenset({"i8mm"}),
    "sve": frozenset({"sve"}),
}
PACKAGES = (
    "chasqui-llama",
    "torch",
    "fairscale",
    "numpy",
    "triton",
    "flashinfer-python",
    "torchao",
)

Value = str | int | float | bool | None


class SkippedError(Exception):
    """A case cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result table: what was measured, under which settings, and what came out."""

    case: str
    settings: Mapping[str, Value]
    values: Mapping[str, Value]  # names end in the unit


@dataclass(frozen=True, slots=True)
class Host:
    """The machine of a run."""

    processor: str
    cores: int  # that this process may run on
    memory_gib: float
    features: tuple[str, ...]  # keys of FEATURES
    system: str
    device: str = ""  # the GPU, if one was measured

    @property
    def wide_dtype(self) -> str:
        """The widest type worth comparing: bfloat16 only where the hardware multiplies it."""
        return "bfloat16" if "bf16" in self.features else "float32"

    @property
    def slug(self) -> str:
        """For the name of a folder, such as `amd-epyc-2c-avx2` or `nvidia-h200`."""
        words = re.sub(r"[^a-z0-9]+", "-", (self.device or self.processor).lower()).strip("-")
        return words if self.device else "-".join((words, f"{self.cores}c", *self.features))


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run found out."""

    kind: str  # the command: engine, service, …
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # what could not be measured, and why
    details: Mapping[str, object]  # what only this kind has
    host: Host
    versions: Mapping[str, str]
    command: tuple[str, ...]
    created: str  # ISO 8601, UTC
    schema: int = SCHEMA


@dataclass(slots=True)
class Recorder:
    """The rows and notes of one run; everything is written after each case."""

    kind: str
    root: Path  # of all results
    details: dict[str, object] = field(default_factory=dict)
    part: str = ""  # folder below the kind's, for example a shape
    deadline: float = float("inf")  # by time.monotonic; no case begins later
    device: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def add_note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> None:
        """Runs a case, and writes what it found even if it fails half-way."""
        started = time.monotonic()
        try:
            if started > self.deadline:
                raise SkippedError("the time of this run was over (--seconds)")
            for row in measure():
                self.rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
        except (SkippedError, StartError) as error:
            self.add_note(f"{case}: skipped: {error}")
        except Exception as error:  # the other cases are as good as before, whatever it is
            traceback.print_exc()
            reason = str(error).partition("\n")[0]
            self.add_note(f"{case}: failed: {type(error).__name__}: {reason}")
            self.failed = True
        print(f"{case}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> Path:
        """Writes the files; returns their folder."""
        report = make_report(self.kind, self.rows, self.notes, self.details, self.device)
        folder = result_folder(report, self.root) / self.part
        write_report(report, folder)
        return folder


def make_report(
    kind: str,
    rows: Iterable[Row],
    notes: Iterable[str],
    details: Mapping[str, object],
    device: str = "",
) -> Report:
    """A report of this run on this machine."""
    return Report(
        kind=kind,
        rows=tuple(rows),
        notes=tuple(notes),
        details=details,
        host=dataclasses.replace(read_host(), device=device),
        versions=versions(),
        command=("python", "-m", f"bench.{kind}", *sys.argv[1:]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def result_folder(report: Report, root: Path = RESULTS) -> Path:
    """Where a report belongs: `<root>/<date>-<machine>/<kind>`."""
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
        f"{host.device + ', ' if host.device else ''}{host.processor}, {host.cores} cores "
        f"({', '.join(host.features)}), {host.memory_gib:g} GiB, {host.system}.",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "`" + " ".join(report.command) + "`",
        *(f"- {text}" for text in report.notes),
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
    """A row on one line, for the terminal."""
    pairs = {**row.settings, **row.values}.items()
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)
    return f"{row.case}: {', '.join(shown)}"


def _cell(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def spread(name: str, values: Sequence[float]) -> dict[str, Value]:
    """Repeated measurements of one thing as three columns: median, lowest, highest.

    The median shrugs off rounds that something else on the machine disturbed; the spread shows that
    there were some.
    """
    median = statistics.median(values)
    return {name: median, f"{name}_low": min(values), f"{name}_high": max(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median of `values` over median of `reference`; both must be from one interleaved run."""
    return statistics.median(values) / statistics.median(reference)


@functools.cache
def read_host() -> Host:
    """Describes the machine that this process runs on."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        first = ""
    pairs = (text.partition(":") for text in first.splitlines())
    info = {name.strip(): value.strip() for name, _, value in pairs}
    return Host(
        processor=info.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        features=features(info.get("flags", info.get("Features", "")).split()),
        system=platform.platform(),
    )


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def features(flags: Iterable[str]) -> tuple[str, ...]:
    """The keys of FEATURES that a processor with these flags has."""
    present = set(flags)
    return tuple(name for name, any_of in FEATURES.items() if any_of & present)


@functools.cache
def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of the sources, and of those packages that are installed."""
    found = {"python": platform.python_version(), "commit": _commit()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
