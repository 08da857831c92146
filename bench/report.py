"""Results: rows, the machine they were measured on, and the files they are written to.

A run writes `result.json`, the record, and `result.md`, the same rows as tables, after every case.
"""

import contextlib
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
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch

from model_service.model.cpu.instructions import instructions
from serving.errors import StartError

SCHEMA = 2
RESULTS = Path(__file__).parent / "results"
WORK_DIR = Path.home() / ".cache" / "chasqui-bench"
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
HELD_BY_VARIABLES = frozenset({"avx512", "vnni", "bf16", "amx"})
PACKAGES = ("torch", "numpy", "fairscale", "triton", "flashinfer-python")

Value = str | int | float | bool | None


class SkippedError(Exception):
    """A case cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result table: what was measured, under which settings, and what came out."""

    case: str
    settings: Mapping[str, Value]
    values: Mapping[str, Value]  # names end in the unit

    def __str__(self) -> str:
        pairs = {**self.settings, **self.values}.items()
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)
        return f"{self.case}: {', '.join(shown)}"


@dataclass(frozen=True, slots=True)
class Host:
    """The machine of a run."""

    processor: str
    cores: int  # that this process may run on
    memory_gib: float
    features: tuple[str, ...]  # keys of FEATURES, of those that kernels may use here
    system: str
    device: str = ""  # the GPU, if one is measured
    unused: tuple[str, ...] = ()  # features from which variables such as ONEDNN_MAX_CPU_ISA hold it

    @property
    def wide_dtype(self) -> str:
        """The widest type worth comparing: bfloat16 only where the hardware multiplies it."""
        return "bfloat16" if self.device or "bf16" in self.features else "float32"

    @property
    def slug(self) -> str:
        """For the name of a folder, such as `amd-epyc-2c-avx2` or `nvidia-h200`."""
        words = re.sub(r"[^a-z0-9]+", "-", (self.device or self.processor).lower()).strip("-")
        return words if self.device else "-".join((words, f"{self.cores}c", *self.features))


@functools.cache
def read_host(device: str = "cpu") -> Host:
    """Describes the machine that this process runs on; `device` is `cpu` or `cuda`."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        first = ""
    pairs = (text.partition(":") for text in first.splitlines())
    info = {name.strip(): value.strip() for name, _, value in pairs}
    there = features(info.get("flags", info.get("Features", "")).split())
    # The variables hold kernels of x86 alone to older instructions.
    unused = HELD_BY_VARIABLES - {*instructions().split()} if "avx2" in there else frozenset()
    return Host(
        processor=info.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        features=tuple(name for name in there if name not in unused),
        system=platform.platform(),
        device=torch.cuda.get_device_name() if device == "cuda" else "",
        unused=tuple(name for name in there if name in unused),
    )


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def features(flags: Iterable[str]) -> tuple[str, ...]:
    """The keys of FEATURES that a processor with these flags has."""
    return tuple(name for name, any_of in FEATURES.items() if any_of.intersection(flags))


@dataclass(slots=True)
class Recorder:
    """The rows and notes of one run; everything is written after each case."""

    kind: str  # the command: engine, service, …
    root: Path  # of all results
    details: Mapping[str, object] = field(default_factory=dict)  # only this kind has them
    part: str = ""  # folder below the kind's, for example a shape
    host: Host = field(default_factory=read_host)
    deadline: float = float("inf")  # by time.monotonic; no case begins later
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why
    failed: bool = False
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def folder(self) -> Path:
        """`<root>/<date>-<machine>/<kind>/<part>`."""
        return self.root / f"{self.created:%Y-%m-%d}-{self.host.slug}" / self.kind / self.part

    def add_note(self, text: str) -> None:
        self.notes.append(text)
        _log(text)

    def attempt(self, case: str, measure: Callable[[], Iterable[Row]]) -> None:
        """Runs a case, and writes what it found even if it fails half-way."""
        started = time.monotonic()
        try:
            if started > self.deadline:
                raise SkippedError("the time of this run was over (--seconds)")
            for row in measure():
                self.rows.append(row)
                _log(str(row))
        except (SkippedError, StartError) as error:
            self.add_note(f"{case}: skipped: {error}")
        except Exception as error:  # the other cases are as good as before, whatever it is
            traceback.print_exc()
            reason = str(error).partition("\n")[0]
            self.add_note(f"{case}: failed: {type(error).__name__}: {reason}")
            self.failed = True
        _log(f"{case}: {time.monotonic() - started:.1f} s")
        self.write()

    def write(self) -> None:
        """Writes `result.json` and `result.md`; those of an earlier run are replaced."""
        document = {
            "kind": self.kind,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "notes": self.notes,
            "details": self.details,
            "host": dataclasses.asdict(self.host),
            "versions": versions(),
            "command": self._command(),
            "created": self.created.isoformat(timespec="seconds"),
            "schema": SCHEMA,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (self.folder / "result.json").write_text(text, encoding="utf-8")
        (self.folder / "result.md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The result in Markdown: machine, versions, notes, and a table per case."""
        host = self.host
        held = f"; held from {' and '.join(host.unused)}" if host.unused else ""
        parts = [
            f"# {self.kind.capitalize()} benchmark, {self.created:%Y-%m-%d}",
            f"{host.device + ', ' if host.device else ''}{host.processor}, {host.cores} cores "
            f"({', '.join(host.features)}{held}), {host.memory_gib:g} GiB, {host.system}.",
            ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
            "`" + " ".join(self._command()) + "`",
            *(f"- {text}" for text in self.notes),
        ]
        for case in dict.fromkeys(row.case for row in self.rows):
            parts += [f"## {case}", table([row for row in self.rows if row.case == case])]
        return "\n\n".join(parts) + "\n"

    def _command(self) -> list[str]:
        return ["python", "-m", f"bench.{self.kind}", *sys.argv[1:]]


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Iterable[Row]) -> str:
    """A Markdown table with the union of the rows' columns, in order of appearance."""
    cells = [{**row.settings, **row.values} for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    lines = [[name.replace("_", " ") for name in columns]]
    lines += ([_cell(row.get(name)) for name in columns] for row in cells)
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _cell(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def spread(name: str, values: Sequence[float]) -> dict[str, Value]:
    """Repeated measurements of one thing as three columns: median, lowest, highest."""
    median = statistics.median(values)
    return {name: median, f"{name}_low": min(values), f"{name}_high": max(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median of `values` over median of `reference`; both must be from one interleaved run."""
    return statistics.median(values) / statistics.median(reference)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of the sources, and of those PACKAGES that are installed."""
    found = {"python": platform.python_version(), "commit": _commit()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_parser(
    name: str, description: str | None, *, default_device: str | None = None
) -> ArgumentParser:
    """The parser of `python -m bench.<name>`; without a device the command has no work folder."""
    parser = ArgumentParser(
        f"python -m bench.{name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of all results")
    if default_device:
        devices = ["cuda", "cpu"]
        add("--device", choices=devices, default=default_device, help=f"default: {default_device}")
        add("--work_dir", type=Path, default=WORK_DIR, help="keeps checkpoints, exports, …")
    return parser


def finish(*recorders: Recorder) -> None:
    """Names the results. Exit status 1 if a case failed."""
    for recorder in recorders:
        print(recorder.folder / "result.md")
    if any(recorder.failed for recorder in recorders):
        raise SystemExit(1)
