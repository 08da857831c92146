"""The draft model of a replica: checks that it can draft for the target, and loads it.

The leader alone loads it, whole, although the target may be in shards: it is small, a sum over
shards would take longer than the part of its products that each rank saves, and the other ranks get
drafts as tokens of the plan.
"""

from dataclasses import dataclass
from functools import partial

import torch

from model_service.engine.drafting.unsharded import unsharded
from model_service.engine.limits import EngineLimits
from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading.first_steps.warm_up import warm_up_plans
from model_service.loading.memory import DraftMemory
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import SMALL_MODEL, Precision, choose_precision
from model_service.model.attention.backend import CacheShape
from model_service.model.attention.select import make_attention
from model_service.model.config import ModelConfig
from model_service.model.cpu.kernels import without_kernels
from model_service.model.graphs.step_graphs import record_steps
from model_service.model.load_network import load_network
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import packing
from model_service.model.weights.source import Shard, WeightSource
from serving.errors import StartError

PROBE_BLOCKS = 1  # kept out of the pool
_ONE_SHARD = 1


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that is not loaded yet."""

    source: WeightSource
    precision: Precision

    def cache(self, blocks: int, block_size: int) -> CacheShape:
        config = self.source.config
        return CacheShape(config.n_layers, blocks, block_size, config.kv_heads, config.head_dim)

    def memory(self, blocks: int, block_size: int) -> DraftMemory:
        """Its memory with a cache of that size."""
        cache = self.cache(blocks, block_size).bytes(self.precision.kv_dtype)
        return DraftMemory(self.precision.shard_bytes(self.source, _ONE_SHARD), cache)


def open_draft_model(
    options: ReplicaOptions, target: ModelConfig, device: torch.device
) -> DraftModel | None:
    """The model in `options.draft_ckpt_dir`, or None if there is none.

    Raises:
        StartError: it cannot be read, or cannot draft for the target; the message says why.
    """
    path = options.draft_ckpt_dir
    if path is None:
        return None
    if not options.draft_tokens:
        raise StartError(
            "--draft_ckpt_dir has no effect with --draft_tokens 0: leave out one of them"
        )
    if options.lookahead == "on":
        raise StartError(
            "--draft_ckpt_dir has no effect with --lookahead on, which launches a step before the "
            "tokens that a draft would follow are known: leave out one of them"
        )
    try:
        source = open_weights(path, verify=options.verify_checkpoint)
        precision = _precision(source.config, device)
    except StartError as error:
        raise StartError(f"--draft_ckpt_dir: {error}") from error
    config = source.config
    if config.vocab_size != target.vocab_size:
        raise StartError(
            f"--draft_ckpt_dir {path} has a vocabulary of {config.vocab_size:,} tokens, and "
            f"{options.ckpt_dir} one of {target.vocab_size:,}: drafts are tokens of the target. To "
            "fix: name a smaller model with the same tokenizer"
        )
    if config.parameters > target.parameters:
        raise StartError(
            f"--draft_ckpt_dir {path} has {config.parameters:,} parameters, more than the "
            f"{target.parameters:,} of {options.ckpt_dir}: its drafts would take longer than the "
            "target's own tokens. To fix: name a smaller model, or exchange the two"
        )
    return DraftModel(source, precision)


def _precision(config: ModelConfig, device: torch.device) -> Precision:
    """The fastest one: no answer depends on how drafts are rounded."""
    small = config.parameters < SMALL_MODEL and bool(without_kernels())
    precision = choose_precision(device, "auto", config.quantization, "auto", small=small)
    precision.check(config, _ONE_SHARD)
    return precision


def load_draft_model(draft: DraftModel, limits: EngineLimits, device: torch.device) -> ModelRunner:
    """A runner of the model, with a cache of as many blocks as the target's.

    Args:
        draft: that was opened.
        limits: of the engine.
        device: of this rank, the leader.
    """
    source, precision = draft.source, draft.precision
    with unsharded():
        network = load_network(
            source.config,
            limits.context_length,
            partial(source.read_shard, Shard(0, _ONE_SHARD, precision.read_dtype(source), device)),
            pack=packing(precision.quantization, precision.dtype, device),
            dtype=precision.dtype,
            device=device,
        )
        attention = make_attention(
            draft.cache(limits.blocks + PROBE_BLOCKS, limits.block_size),
            precision.dtype,
            device,
            precision.kv_dtype,
            heads=source.config.n_heads,
            max_batch_size=limits.max_batch_size,
        )
        graphs = record_steps(
            network,
            attention,
            max_batch_size=limits.max_batch_size,
            max_step_tokens=limits.max_step_tokens,
            context_length=limits.context_length,
            device=device,
        )
        runner = ModelRunner(network, attention, PlanChannel(_ONE_SHARD), device, graphs)
        if device.type == "cuda":
            for plan in warm_up_plans(limits).values():
                runner.warm_up(plan)
    return runner
