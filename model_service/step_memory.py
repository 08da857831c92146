"""What a step takes on a CUDA device beside weights and cache, measured by running the largest.

Activations, logits, an attention backend's workspace and what libraries keep depend on more than a
formula would know. So they are measured with the weights in place and a cache of one block, before
the cache takes what is left.
"""

import gc
from collections.abc import Callable

import torch

from model_service.engine.engine import EngineLimits
from model_service.engine.runner import ModelRunner
from model_service.engine.warm_up import warm_up_plans, warm_up_sampling
from serving.errors import StartError


def step_memory(
    make_runner: Callable[[], ModelRunner], limits: EngineLimits, device: torch.device
) -> int:
    """Bytes that PyTorch's allocator took for the largest steps, and what a runner keeps for them.

    Every rank must ask at the same time, as they compute the steps together.

    Args:
        make_runner: with a cache of the probe block alone; what it makes is given up again.
        limits: of the engine to come.
        device: a CUDA device, with this rank's weights.

    Raises:
        StartError: the device has no memory for such steps.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    try:
        runner = make_runner()
        for plan in warm_up_plans(limits).values():
            runner.warm_up(plan)
        warm_up_sampling(limits, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise StartError(
            f"the weights leave {device} no memory for a step of {limits.max_step_tokens} tokens "
            f"or {limits.max_batch_size} sequences. To fix: lower --max_step_tokens or "
            "--max_batch_size, choose a smaller --dtype or --quantize, or spread the model over "
            "more GPUs with torchrun"
        ) from None
    taken = torch.cuda.max_memory_reserved(device) - before
    del runner
    gc.collect()  # what is in cycles still holds its memory
    torch.cuda.empty_cache()
    return taken
