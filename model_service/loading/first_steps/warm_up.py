"""The first steps of a rank, before it serves: they compile and load every kernel.

They also show how much memory a step takes. All of their sequences lie in the probe block, so they
need no further cache.
"""

import logging
import time

import numpy as np
import torch

from model_service.engine.limits import EngineLimits
from model_service.engine.sampling.device.sampler import DeviceSampler
from model_service.engine.sequence import GenerationRequest, SamplingParams, Sequence
from model_service.engine.step.batch import LogitRow
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.runner import ModelRunner
from model_service.model.attention.backend import PROBE_BLOCK, SequenceSpan

_log = logging.getLogger(__name__)


def warm_up(runner: ModelRunner, limits: EngineLimits) -> None:
    """Runs the steps of `warm_up_plans`; every rank at the same time."""
    for name, plan in warm_up_plans(limits).items():
        started = time.monotonic()
        # Reading the sum waits for the device.
        runner.warm_up(plan).sum().item()
        _log.info("warm-up, %s: %.1f s", name, time.monotonic() - started)
    warm_up_sampling(limits, runner.device)


def warm_up_sampling(limits: EngineLimits, device: torch.device) -> None:
    """Runs the largest sampling: a draw with all options for every sequence, then a draw beside the
    logprobs of a step's prompts.
    """
    sampler = DeviceSampler(limits.vocab_size, device)
    sampling = SamplingParams(1.0, top_p=0.9, presence_penalty=1.0, logit_bias={0: 1.0})
    asked = GenerationRequest(None, (0,), 1, sampling, logprobs=True, top_logprobs=1)
    draws = [
        LogitRow(Sequence.from_request(asked, limits.context_length, 0), 1, [])
        for _ in range(limits.max_batch_size)
    ]
    text = GenerationRequest(None, (0,) * limits.max_step_tokens, 0, prompt_logprobs=True)
    prompt, plain = (
        Sequence.from_request(request, limits.context_length, 0)
        for request in (text, GenerationRequest(None, (0,), 1))
    )
    scores = [LogitRow(prompt, position, []) for position in range(1, limits.max_step_tokens)]
    for rows in (draws, [*scores, LogitRow(plain, 1, [])]):
        sampler.launch(rows, torch.zeros(len(rows), limits.vocab_size, device=device))


def warm_up_plans(limits: EngineLimits) -> dict[str, StepPlan]:
    """By name, the largest step of each kind: prompts, decode, and both in one."""
    rows = limits.max_batch_size
    return {
        # With logits for every token, as `prompt_logprobs` wants them.
        "prompts": _plan(limits, 0, limits.max_step_tokens),
        "decode": _plan(limits, rows, 0),
        # As much of each as a step holds, and at least one.
        "both": _plan(limits, max(1, rows // 2), max(2, limits.max_step_tokens - rows // 2)),
    }


def _plan(limits: EngineLimits, rows: int, prompt_tokens: int) -> StepPlan:
    """`rows` decoding sequences of full length, then whole prompts, the last as long as is left."""
    length = limits.context_length
    # A context beyond one block takes the same block again.
    table = (PROBE_BLOCK,) * -(-length // limits.block_size)
    whole, left = divmod(prompt_tokens, length)
    spans = [SequenceSpan(1, length, table)] * rows
    spans += [SequenceSpan(prompt, prompt, table) for prompt in [length] * whole + [left] if prompt]
    tokens = rows + prompt_tokens
    return StepPlan(
        tuple(spans),
        tokens=np.zeros(tokens, dtype=np.int32),
        logit_rows=np.arange(tokens, dtype=np.int32),
    )
