"""What a step takes on a CUDA device beside weights and cache, measured by running the largest.

Activations, logits, an attention backend's workspace and what libraries keep depend on more than a
formula would know. So they are measured with the weights in place and a cache of one block, before
the cache takes what is left.
"""

import gc
from collections.abc import Callable

import numpy as np
import torch

from model_service.engine.block_pool import PROBE_BLOCK
from model_service.engine.engine import EngineLimits
from model_service.engine.plan import StepPlan
from model_service.engine.runner import ModelRunner
from model_service.model.attention import SequenceSpan
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
        for plan in largest_steps(limits):
            runner.warm_up(plan)
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


def largest_steps(limits: EngineLimits) -> tuple[StepPlan, StepPlan]:
    """Prompts with logits for every token, as `prompt_logprobs` wants them, and a full batch.

    All tokens lie in the probe block: what they read is of no matter. The batch's sequences are as
    long as the cache could hold that many of.
    """
    whole, left = divmod(limits.max_step_tokens, limits.context_length)
    prompts = [limits.context_length] * whole + [left] * (left > 0)
    held = limits.blocks * limits.block_size // limits.max_batch_size
    length = max(1, min(limits.context_length, held))
    return (
        _step([_span(prompt, prompt, limits) for prompt in prompts]),
        _step([_span(1, length, limits)] * limits.max_batch_size),
    )


def _span(query_length: int, length: int, limits: EngineLimits) -> SequenceSpan:
    blocks = -(-length // limits.block_size)
    return SequenceSpan(query_length, length, [PROBE_BLOCK] * blocks)


def _step(spans: list[SequenceSpan]) -> StepPlan:
    tokens = sum(span.query_length for span in spans)
    rows = np.arange(tokens, dtype=np.int32)
    return StepPlan(tuple(spans), tokens=np.zeros(tokens, dtype=np.int32), logit_rows=rows)
