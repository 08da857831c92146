"""The memory of this machine that a process may still take. Imports no PyTorch."""

from pathlib import Path

import psutil

GIB = 2**30
# Activations, buffers and the interpreter, beside weights and cache.
WORKING_MEMORY = GIB // 4


def free_host_memory() -> int:
    """Bytes that this process may still allocate, within the limit of its container."""
    return min(psutil.virtual_memory().available, _free_in_cgroup())


def _free_in_cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """The free part of the container's memory limit (cgroup v2); psutil sees the whole machine."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return psutil.virtual_memory().total
    # Cached file pages count as used, and are given up when memory is wanted.
    return limit - used + int(statistics.get("inactive_file", 0))


def readable_size(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
