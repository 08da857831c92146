"""Compares the memory that a shard needs with the free memory, before anything is allocated.

On CUDA, `first_steps/step_memory.py` replaces the estimate for a step by a measurement.
"""

from dataclasses import dataclass

import torch

from model_service.loading.host_memory import GIB, free_host_memory, readable_size
from model_service.loading.host_memory import WORKING_MEMORY as WORKING_MEMORY  # noqa: PLC0414
from serving.errors import StartError
from serving.numbers import format_apart

# The share of the memory left by the weights that a cache of no given size may take. A CPU's memory
# is shared with everything else on the machine.
CACHE_SHARE = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True, slots=True)
class DraftMemory:
    """The memory of a draft model, in bytes. One shard, the leader, has it."""

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache

    def __str__(self) -> str:
        return (
            f"draft model {readable_size(self.weights)}, its KV cache "
            f"{readable_size(self.kv_cache)}"
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that one shard will allocate, in bytes."""

    weights: int
    kv_cache: int
    kv_tokens: int  # tokens that the cache holds
    working: int = WORKING_MEMORY  # the most that a step takes beside them
    draft: DraftMemory | None = None

    def __str__(self) -> str:
        own = (
            f"weights {readable_size(self.weights)}, "
            f"KV cache {readable_size(self.kv_cache)} = {self.kv_tokens:,} tokens"
        )
        return own if self.draft is None else f"{own}, {self.draft}"

    def check(
        self, device: torch.device, shards_on_device: int, *, weights_are_there: bool = False
    ) -> None:
        """Raises StartError when `shards_on_device` shards of this size do not fit.

        Args:
            device: where.
            shards_on_device: that take their memory from it.
            weights_are_there: whether they were allocated already.
        """
        needed = (self.weights + self.kv_cache + self.working) * shards_on_device
        needed += self.draft.total if self.draft else 0
        free = free_memory(device) + (self.weights * shards_on_device if weights_are_there else 0)
        if needed > free:
            shards = f"{shards_on_device} shards" if shards_on_device > 1 else "the model"
            unit, bytes_of_it = ("GiB", GIB) if needed >= GIB else ("MiB", 2**20)
            wanted, there = format_apart(needed / bytes_of_it, free / bytes_of_it)
            raise StartError(
                f"{shards} would need {wanted} {unit} on {device} ({self}, working memory "
                f"{readable_size(self.working)}), but {there} {unit} are free. "
                "To fix: lower --kv_cache_tokens, --max_batch_size, --max_step_tokens or "
                "--max_seq_len, choose a smaller --dtype, or spread the model over more GPUs "
                "(--shards) or machines (docs/operations/memory.md)"
            )


def cache_tokens(
    device: torch.device,
    shards_on_device: int,
    *,
    weights: int,
    bytes_per_token: int,
    working: int = WORKING_MEMORY,
    draft: DraftMemory | None = None,
) -> int:
    """Tokens for which this shard's cache may take memory.

    Args:
        device: of this shard.
        shards_on_device: that take their memory from the same device.
        weights: bytes of this shard's that are still to be allocated.
        bytes_per_token: of this shard's cache.
        working: bytes that a step takes beside weights and cache.
        draft: a draft model beside them, whose cache has one token.
    """
    left = free_memory(device) / shards_on_device - weights - working
    of_token = float(bytes_per_token)
    if draft is not None:
        left -= draft.weights / shards_on_device
        of_token += draft.kv_cache / shards_on_device
    return max(0, int(left * CACHE_SHARE[device.type] / of_token))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()
