"""Measures the memory of a step on a CUDA device, beside weights and cache, by running the largest.

Activations, logits, recorded graphs, an attention backend's workspace and what libraries keep
depend on more than a formula would know. So they are measured with the weights in place and a cache
of one block, before the cache takes what is left.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from model_service.engine.limits import EngineLimits
from model_service.engine.step.runner import ModelRunner
from model_service.loading.first_steps.warm_up import warm_up_plans, warm_up_sampling
from serving.errors import StartError


def step_memory(
    make_runner: Callable[[], ModelRunner], limits: EngineLimits, device: torch.device
) -> int:
    """Bytes that the largest steps take, and that a runner keeps for them, graphs included.

    Every rank must ask at the same time, as they compute the steps together.

    Args:
        make_runner: with a cache of the probe block alone; the runner is deleted afterwards.
        limits: of the engine to come.
        device: a CUDA device, with this rank's weights.

    Raises:
        StartError: the device has no memory for such steps.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    with memory_for_steps(limits, device):
        runner = make_runner()
        for plan in warm_up_plans(limits).values():
            runner.warm_up(plan)
        warm_up_sampling(limits, device)
        torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_reserved(device) - before
    with_graphs = _beside_allocator(device)
    del runner
    gc.collect()  # what is in cycles still holds its memory
    torch.cuda.empty_cache()
    # Loaded kernels stay, and are not part of the free memory any more.
    return taken + max(0, with_graphs - _beside_allocator(device))


@contextmanager
def memory_for_steps(limits: EngineLimits, device: torch.device) -> Iterator[None]:
    """Turns running out of memory in the largest steps into a StartError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise StartError(
            f"{device} ran out of memory for steps of {limits.max_step_tokens} tokens or "
            f"{limits.max_batch_size} sequences beside the weights and the KV cache. To fix: lower "
            "--kv_cache_tokens, --max_step_tokens or --max_batch_size, choose a smaller --dtype or "
            "--quantize, or spread the model over more GPUs with --shards"
        ) from None


def _beside_allocator(device: torch.device) -> int:
    """Bytes in use on the device outside of PyTorch's allocator: graphs, kernels."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free) - torch.cuda.memory_reserved(device)
