"""Loads one rank of a replica: checkpoint, process group, precision, memory, network, cache.

The service and `llama.Llama.build` both start here; each uses the replica in its own way.
"""

import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from model_service.engine.step.plan_channel import LEADER, PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading import distributed
from model_service.loading.draft_model import load_draft_model, open_draft_model
from model_service.loading.first_steps.step_memory import memory_for_steps, step_memory
from model_service.loading.first_steps.warm_up import warm_up
from model_service.loading.host_memory import readable_size
from model_service.loading.layout import Layout
from model_service.loading.memory import MemoryPlan
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import SMALL_MODEL, Precision, choose_device, choose_precision
from model_service.loading.progress import reported
from model_service.loading.replica import ModelInfo, Replica
from model_service.model.config import ModelConfig
from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.kernels import without_kernels
from model_service.model.graphs.step_graphs import record_steps
from model_service.model.load_network import load_network
from model_service.model.network import Transformer
from model_service.model.weights.files.hugging_face import HuggingFaceCheckpoint
from model_service.model.weights.files.meta.checkpoint import Checkpoint
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import packing
from model_service.model.weights.partition import shard_parameters
from model_service.model.weights.source import Allocate, Shard, WeightSource
from serving.errors import StartError

_log = logging.getLogger(__name__)


def load_replica(options: ReplicaOptions, source: WeightSource | None = None) -> Replica:
    """Loads this rank's shard of the checkpoint.

    Args:
        options: how to load it.
        source: weights to take instead of the checkpoint in `options.ckpt_dir`.

    Raises:
        StartError: the checkpoint, the machine or the options do not allow it; the message says
            what to change. Raised on every rank, before anything large is allocated; only on CUDA,
            where a step's memory is measured with the weights in place, it may come after them.
    """
    device_type = choose_device(options.device)
    if source is None:
        source = open_weights(options.ckpt_dir, verify=options.verify_checkpoint)
    device = distributed.initialize(device_type)
    shards, rank = dist.get_world_size(), dist.get_rank()
    config = source.config
    _check_context(config, options)
    _check_shards(config, shards)
    small = shard_parameters(source.config, shards) < SMALL_MODEL
    quantize = config.quantization if options.quantize == "auto" else options.quantize
    precision = choose_precision(
        device,
        options.dtype,
        quantize,
        options.kv_cache_dtype,
        small=small,
        batch_invariant=options.batch_invariant,
    )
    precision.check(config, shards)
    distributed.use_threads(options.threads or (1 if small else None))

    draft = open_draft_model(options, config, device)
    layout = Layout(options, config, shards, precision, device, draft)
    weights = precision.shard_bytes(source, shards)
    limits = layout.limits(weights=weights)
    memory = layout.memory(limits, weights)
    if rank == LEADER:
        _log.info("%s: %s", options.ckpt_dir, _summary(source, shards, precision, memory))
        if device.type == "cpu":
            _log_kernels(precision)
    memory.check(device, layout.shards_on_device)
    layout.prepare_attention()
    # No rank allocates before every rank has measured what is free.
    dist.barrier()

    def read(allocate: Allocate) -> Iterator[tuple[str, torch.Tensor]]:
        shard = Shard(rank, shards, precision.read_dtype(source), device)
        weights = source.read_shard(shard, allocate)
        return reported(weights, shard_parameters(config, shards)) if rank == LEADER else weights

    network = load_network(
        config,
        limits.context_length,
        read,
        pack=packing(
            precision.quantization,
            precision.dtype,
            device,
            batch_invariant=precision.batch_invariant,
        ),
        dtype=precision.dtype,
        device=device,
        batch_invariant=precision.batch_invariant,
    )

    if device.type == "cuda":
        working = step_memory(lambda: _make_runner(layout, network, 0), limits, device)
        limits = layout.limits(weights=0, working=working)
        memory = layout.memory(limits, weights, working)
        if rank == LEADER:
            step = readable_size(working)
            _log.info("%s: a step takes up to %s; %s", options.ckpt_dir, step, memory)
        memory.check(device, layout.shards_on_device, weights_are_there=True)
    with memory_for_steps(limits, device):
        runner = _make_runner(layout, network, limits.blocks)
        if device.type == "cuda":
            warm_up(runner, limits)
    is_leader = rank == LEADER
    draft_runner = load_draft_model(draft, limits, device) if draft and is_leader else None
    info = ModelInfo.of(options, source, shards, precision, device, is_leader=is_leader)
    return Replica(info, limits, runner, is_leader=is_leader, draft_runner=draft_runner)


def _make_runner(layout: Layout, network: Transformer, blocks: int) -> ModelRunner:
    """A runner with a new cache of `blocks` blocks."""
    attention = layout.attention(blocks)
    graphs = record_steps(
        network,
        attention,
        max_batch_size=layout.options.max_batch_size,
        max_step_tokens=max(layout.options.max_step_tokens, layout.options.max_batch_size),
        context_length=layout.options.max_seq_len,
        device=layout.device,
    )
    return ModelRunner(network, attention, PlanChannel(), layout.device, graphs)


def _check_context(config: ModelConfig, options: ReplicaOptions) -> None:
    trained = config.trained_context_length
    if trained is not None and options.max_seq_len > trained:
        raise StartError(
            f"--max_seq_len is {options.max_seq_len}, but the checkpoint in {options.ckpt_dir} was "
            f"trained for at most {trained} tokens. To fix: lower --max_seq_len"
        )


def _check_shards(config: ModelConfig, shards: int) -> None:
    indivisible = config.indivisible_by(shards)
    if indivisible:
        raise StartError(
            f"{shards} shards do not divide {', '.join(indivisible)} of this checkpoint: each "
            f"shard holds an equal part of {', '.join(config.divided_sizes)}. To fix: start one "
            f"of these numbers of shards: {', '.join(map(str, config.shard_counts()))}"
        )


def _summary(source: WeightSource, shards: int, precision: Precision, memory: MemoryPlan) -> str:
    files = len(source.files) if isinstance(source, Checkpoint | HuggingFaceCheckpoint) else 0
    stored = f"{files} file{'s' * (files > 1)}, " if files else ""
    return (
        f"{_readable_count(source.config.parameters)}, {stored}{precision}, "
        f"{shards} shard{'s, each' if shards > 1 else ','} {memory}"
    )


def _log_kernels(precision: Precision) -> None:
    """Says which kernels compute on this CPU."""
    if precision.uses_own_kernels:
        _log.info("kernels: this package's, for %s", instructions())
    elif reason := without_kernels():
        _log.warning(
            "kernels: PyTorch's, without this package's own (%s): slower for few streams, and "
            "answers may depend on other requests",
            reason,
        )
    else:
        _log.info("kernels: PyTorch's; this package has none for %s", precision)


def _readable_count(parameters: int) -> str:
    """A number of parameters as in the names of models: 13B, 3.9M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.{0 if parameters >= 10 * size else 1}f}{letter}"
    return str(parameters)
