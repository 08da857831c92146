"""Loads one rank of a replica: checkpoint, process group, memory, network, cache.

The service and `llama.Llama.build` both start here; what they do with the replica is theirs.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from model_service.engine.engine import Engine, EngineLimits
from model_service.engine.step.plan_channel import LEADER, PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading import distributed
from model_service.loading.memory import WORKING_MEMORY, MemoryPlan, cache_tokens, readable_size
from model_service.loading.precision import (
    Determinism,
    Precision,
    choose_device,
    choose_precision,
)
from model_service.loading.step_memory import memory_for_steps, step_memory
from model_service.loading.warm_up import warm_up
from model_service.model.attention.backend import CachedAttention, CacheShape
from model_service.model.attention.select import make_attention
from model_service.model.config import ModelConfig, Quantization
from model_service.model.cpu import instructions
from model_service.model.cuda_graphs import record_decode
from model_service.model.network import load_network
from model_service.model.weights.checkpoint import Checkpoint, open_checkpoint
from model_service.model.weights.packing import packing
from model_service.model.weights.source import WeightSource
from serving.errors import StartError

_log = logging.getLogger(__name__)

PROBE_BLOCKS = 1  # kept out of the pool
# Below this many weights a shard's step is over sooner than a second thread wakes up, and on a busy
# machine threads wait for each other at every layer.
SMALL_MODEL = 20_000_000
# A cache of no given size holds no more than all running sequences at full length, this many times
# over: beyond it, what it keeps for later turns is hardly ever asked for.
MAX_CACHE = 16


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How to load a checkpoint; `auto` and None are decided by what the machine has."""

    ckpt_dir: Path
    max_seq_len: int = 512  # tokens of one sequence, prompt and answer
    max_batch_size: int = 8  # sequences that run at once
    max_step_tokens: int = 512  # tokens that one step computes
    max_stall: float = 1.7  # longest step while sequences decode, in steps without prompts
    kv_cache_tokens: int | None = None  # default: what free memory allows
    prefix_cache: bool = True
    draft_tokens: int = 8  # most guesses for a sequence in a step; 0: no speculation
    block_size: int = 16  # tokens per block of the cache
    # On CUDA float16, as Meta's code; on the CPU bfloat16 where it computes in it, else float32.
    dtype: str = "auto"
    quantize: str = "auto"  # none, int8, int4 or fp8; auto: as the checkpoint is stored
    kv_cache_dtype: str = "auto"  # fp8, or that of the activations
    lookahead: str = "auto"  # launch a step before the last one's tokens are read: on for CUDA
    device: str = "auto"  # cuda where there is one
    threads: int | None = None
    verify_checkpoint: bool = True
    model_name: str | None = None  # default: the folder's name


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded."""

    name: str
    parameters: int
    vocab_size: int
    context_length: int
    shards: int
    dtype: str
    quantization: Quantization
    device: str
    fingerprint: str
    determinism: Determinism
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Replica:
    """One rank of a loaded replica. The leader makes the engine, the others follow its runner."""

    info: ModelInfo
    limits: EngineLimits
    runner: ModelRunner
    is_leader: bool

    def engine(self) -> Engine:
        return Engine(self.runner, self.limits)


def load_replica(options: ReplicaOptions, source: WeightSource | None = None) -> Replica:
    """Loads this rank's shard of the checkpoint.

    Args:
        options: how.
        source: weights to take instead of the checkpoint in `options.ckpt_dir`.

    Raises:
        StartError: the checkpoint, the machine or the options do not allow it; the message says
            what to change. Raised on every rank, before anything large is allocated; only on CUDA,
            where a step's memory is measured with the weights in place, it may come after them.
    """
    device_type = choose_device(options.device)
    if source is None:
        source = open_checkpoint(options.ckpt_dir, verify=options.verify_checkpoint)
    device = distributed.initialize(device_type)
    shards, rank = dist.get_world_size(), dist.get_rank()
    config = source.config
    _check_shards(config, shards)
    small = source.shard_parameters(shards) < SMALL_MODEL
    precision = choose_precision(
        device,
        options.dtype,
        config.quantization if options.quantize == "auto" else options.quantize,
        options.kv_cache_dtype,
        small=small,
    )
    precision.check(config, shards)
    distributed.use_threads(options.threads or (1 if small else None))

    layout = _Layout(options, config, shards, precision, device)
    weights = precision.shard_bytes(source, shards)
    limits = layout.limits(weights=weights)
    memory = layout.memory(limits, weights)
    if rank == LEADER:
        _log.info("%s: %s", options.ckpt_dir, _summary(source, shards, precision, memory))
    memory.check(device, layout.neighbours)
    # No rank allocates before every rank has measured what is free.
    dist.barrier()

    network = load_network(
        config,
        limits.context_length,
        source.read_shard(rank, shards, precision.read_dtype, device),
        pack=packing(precision.quantization, precision.dtype, device),
        dtype=precision.dtype,
        device=device,
    )

    def make_runner(blocks: int) -> ModelRunner:
        attention = layout.attention(blocks + PROBE_BLOCKS)
        graphs = record_decode(
            network,
            attention,
            max_batch_size=limits.max_batch_size,
            context_length=limits.context_length,
            device=device,
        )
        return ModelRunner(network, attention, PlanChannel(), device, graphs)

    if device.type == "cuda":
        working = step_memory(lambda: make_runner(0), limits, device)
        limits = layout.limits(weights=0, working=working)
        memory = layout.memory(limits, weights, working)
        if rank == LEADER:
            step = readable_size(working)
            _log.info("%s: a step takes up to %s; %s", options.ckpt_dir, step, memory)
        memory.check(device, layout.neighbours, weights_are_there=True)
    with memory_for_steps(limits, device):
        runner = make_runner(limits.blocks)
        if device.type == "cuda":
            warm_up(runner, limits)
    info = ModelInfo(
        name=options.model_name or options.ckpt_dir.resolve().name,
        parameters=source.parameters,
        vocab_size=config.vocab_size,
        context_length=limits.context_length,
        shards=shards,
        dtype=precision.dtype_name,
        quantization=precision.quantization,
        device=_device_name(device),
        fingerprint=_fingerprint(source, shards, precision, device),
        determinism=precision.determinism,
        max_batch_size=limits.max_batch_size,
    )
    return Replica(info, limits, runner, is_leader=rank == LEADER)


def _check_shards(config: ModelConfig, shards: int) -> None:
    indivisible = config.indivisible_by(shards)
    if indivisible:
        raise StartError(
            f"{shards} shards do not divide {', '.join(indivisible)} of this checkpoint: each "
            f"shard holds an equal part of {', '.join(config.divided_sizes)}. To fix: start one "
            f"of these numbers of shards: {', '.join(map(str, config.shard_counts()))}"
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one rank's memory divides."""

    options: ReplicaOptions
    config: ModelConfig
    shards: int
    precision: Precision
    device: torch.device

    @property
    def neighbours(self) -> int:
        """Shards that take their memory from the same device."""
        return 1 if self.device.type == "cuda" else distributed.local_world_size()

    def limits(self, *, weights: int, working: int = WORKING_MEMORY) -> EngineLimits:
        """The engine's limits, with a cache of what all ranks have memory for.

        Args:
            weights: bytes of this rank's that are still to be allocated.
            working: bytes that a step takes.
        """
        token = self._cache(blocks=1, block_size=1).bytes(self.precision.kv_dtype)
        affordable = cache_tokens(
            self.device, self.neighbours, weights=weights, bytes_per_token=token, working=working
        )
        return _limits(
            self.options, self.config, self.device.type, distributed.min_over_ranks(affordable)
        )

    def memory(
        self, limits: EngineLimits, weights: int, working: int = WORKING_MEMORY
    ) -> MemoryPlan:
        cache = self._cache(limits.blocks + PROBE_BLOCKS, limits.block_size)
        size = cache.bytes(self.precision.kv_dtype)
        return MemoryPlan(weights, size, limits.blocks * limits.block_size, working)

    def attention(self, blocks: int) -> CachedAttention:
        """A backend with a new cache of `blocks` blocks."""
        return make_attention(
            self._cache(blocks, self.options.block_size),
            self.precision.dtype,
            self.device,
            self.precision.kv_dtype,
            heads=self.config.n_heads // self.shards,
            max_batch_size=self.options.max_batch_size,
        )

    def _cache(self, blocks: int, block_size: int) -> CacheShape:
        return CacheShape(
            layers=self.config.n_layers,
            blocks=blocks,
            block_size=block_size,
            kv_heads=self.config.kv_heads // self.shards,
            head_dim=self.config.head_dim,
        )


def _limits(
    options: ReplicaOptions, config: ModelConfig, device_type: str, affordable: int
) -> EngineLimits:
    """The engine's limits; `affordable` is how many tokens the cache has memory for."""
    most = MAX_CACHE * options.max_batch_size * options.max_seq_len
    # Where not even one sequence is affordable, the memory check says so with its numbers.
    tokens = options.kv_cache_tokens or max(options.max_seq_len, min(affordable, most))
    if tokens < options.max_seq_len:
        raise StartError(
            f"--kv_cache_tokens {tokens} is less than --max_seq_len {options.max_seq_len}: "
            "the cache must hold at least one whole sequence"
        )
    return EngineLimits(
        context_length=options.max_seq_len,
        vocab_size=config.vocab_size,
        max_batch_size=options.max_batch_size,
        max_step_tokens=max(options.max_step_tokens, options.max_batch_size),
        blocks=-(-tokens // options.block_size),
        block_size=options.block_size,
        prefix_cache=options.prefix_cache,
        max_stall=options.max_stall,
        draft_tokens=options.draft_tokens,
        # On the CPU a step is over when it has been launched.
        lookahead=device_type == "cuda"
        if options.lookahead == "auto"
        else options.lookahead == "on",
    )


def _summary(source: WeightSource, shards: int, precision: Precision, memory: MemoryPlan) -> str:
    files = len(source.files) if isinstance(source, Checkpoint) else 0
    stored = f"{files} file{'s' * (files > 1)}, " if files else ""
    return (
        f"{_count(source.parameters)}, {stored}{precision}, "
        f"{shards} shard{'s, each' if shards > 1 else ','} {memory}"
    )


def _count(parameters: int) -> str:
    """As models are called: 13B, 3.9M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.{0 if parameters >= 10 * size else 1}f}{letter}"
    return str(parameters)


def _device_name(device: torch.device) -> str:
    """With what tells kernels apart that round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({instructions()})"


def _fingerprint(
    source: WeightSource, shards: int, precision: Precision, device: torch.device
) -> str:
    kernels = f"{_device_name(device)} {torch.__version__}"
    identity = f"{source.fingerprint()} {shards} {precision} {kernels}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
