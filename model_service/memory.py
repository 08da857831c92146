"""What a shard needs and what the machine has, compared before anything is allocated."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from serving.errors import StartError

GIB = 2**30
# Activations, buffers and the interpreter, beside weights and cache.
WORKING_MEMORY = GIB // 4
# What a cache of no given size may take of the memory that the weights leave. The CPU's is shared
# with everything else on the machine.
CACHE_SHARE = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one shard is going to allocate, in bytes."""

    weights: int
    kv_cache: int
    kv_tokens: int  # tokens that the cache holds

    def __str__(self) -> str:
        return (
            f"weights {_size(self.weights)}, "
            f"KV cache {_size(self.kv_cache)} = {self.kv_tokens:,} tokens"
        )

    def check(self, device: torch.device, shards_on_device: int) -> None:
        """Raises StartError when `shards_on_device` shards of this size do not fit."""
        needed = (self.weights + self.kv_cache + WORKING_MEMORY) * shards_on_device
        free = free_memory(device)
        if needed > free:
            shards = f"{shards_on_device} shards" if shards_on_device > 1 else "the model"
            raise StartError(
                f"{shards} would need {_size(needed)} on {device} ({self}, working memory "
                f"{_size(WORKING_MEMORY)}), but {_size(free)} are free. "
                "To fix: lower --kv_cache_tokens, "
                "--max_batch_size or --max_seq_len, choose a smaller --dtype, or spread the model "
                "over more machines or GPUs with torchrun"
            )


def cache_tokens(
    device: torch.device, shards_on_device: int, *, weights: int, bytes_per_token: int
) -> int:
    """Tokens for which this shard's cache may take memory, before anything is allocated.

    Args:
        device: of this shard.
        shards_on_device: that take their memory from the same device.
        weights: bytes of this shard's.
        bytes_per_token: of this shard's cache.
    """
    left = free_memory(device) / shards_on_device - weights - WORKING_MEMORY
    return max(0, int(left * CACHE_SHARE[device.type])) // bytes_per_token


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, _free_in_cgroup())


def _free_in_cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's memory limit leaves; psutil sees the whole machine. cgroup v2."""
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


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
