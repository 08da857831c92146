"""What a result was measured on: the processor, what it can do, and the versions of the software.

Figures mean nothing without these, so every result file carries them.
"""

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

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
    *("chasqui-llama", "torch", "fairscale", "numpy", "gguf", "safetensors", "matplotlib"),
    *("triton", "flashinfer-python", "torchao", "transformers"),
)


@dataclass(frozen=True, slots=True)
class Host:
    """The machine of a run."""

    processor: str
    cores: int  # that this process may run on
    memory_gib: float
    features: tuple[str, ...]  # keys of FEATURES
    system: str

    @property
    def wide_dtype(self) -> str:
        """The widest type worth comparing: bfloat16 only where the hardware multiplies it."""
        return "bfloat16" if "bf16" in self.features else "float32"

    @property
    def slug(self) -> str:
        """For the name of a folder, such as `amd-epyc-2c-avx2`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.processor.lower()).strip("-")
        return "-".join((words, f"{self.cores}c", *self.features))


def read_host() -> Host:
    """Describes the machine that this process runs on."""
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return Host(
        processor=info.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        features=features(flags),
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


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of the sources, and of those packages that are installed."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
