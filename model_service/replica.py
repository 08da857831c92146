"""Loads one rank of a replica: checkpoint, process group, memory, network, cache.

The service and `llama.Llama.build` both start here; what they do with the replica is theirs.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from model_service import distributed
from model_service.arithmetic import Arithmetic, choose_arithmetic, choose_device
from model_service.engine.engine import Engine, EngineLimits
from model_service.engine.plan_channel import LEADER, PlanChannel
from model_service.engine.runner import ModelRunner
from model_service.memory import MemoryPlan, cache_tokens
from model_service.model.attention import CacheShape, SdpaAttention
from model_service.model.checkpoint import open_checkpoint
from model_service.model.config import ModelConfig
from model_service.model.network import load_network
from model_service.model.quantization import Quantization
from model_service.model.weights import packing
from serving.errors import StartError

_log = logging.getLogger(__name__)

PROBE_BLOCKS = 1  # kept out of the pool
# Below this many weights a shard's step is over sooner than a second thread wakes up, and on a busy
# machine threads wait for each other at every layer.
SMALL_MODEL = 20_000_000
# A cache of no given size holds no more than all running sequences at full length, this many times
# over: beyond it, what it keeps for later turns is hardly ever asked for.
MOST_CACHE = 16


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How to load a checkpoint; `auto` and None are decided by what the machine has."""

    ckpt_dir: Path
    max_seq_len: int = 512  # tokens of one sequence, prompt and answer
    max_batch_size: int = 8  # sequences that run at once
    max_step_tokens: int = 512  # tokens that one step computes
    max_stall: float = 2.0  # longest step while sequences decode, in steps without prompts
    kv_cache_tokens: int | None = None  # default: what free memory allows
    prefix_cache: bool = True
    draft_tokens: int = 8  # most guesses for a sequence in a step; 0: no speculation
    block_size: int = 16  # tokens per block of the cache
    # On CUDA float16, as Meta's code; on the CPU bfloat16 where it computes in it, else float32.
    dtype: str = "auto"
    quantize: str = "auto"  # none, int8 or int4; auto: as the checkpoint is stored
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


class WeightSource(Protocol):
    """Where weights come from: an opened checkpoint, or what a benchmark makes."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def parameters(self) -> int: ...

    def shard_parameters(self, shards: int, *, linear: bool | None = None) -> int: ...

    def read_shard(
        self, rank: int, shards: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]: ...

    def fingerprint(self) -> str: ...


def load_replica(options: ReplicaOptions, source: WeightSource | None = None) -> Replica:
    """Loads this rank's shard of the checkpoint, or of `source` in its place.

    Raises:
        StartError: the checkpoint, the machine or the options do not allow it; the message says
            what to change. Raised on every rank, before anything large is allocated.
    """
    device_type = choose_device(options.device)
    checkpoint = source or open_checkpoint(options.ckpt_dir, verify=options.verify_checkpoint)
    device = distributed.initialize(device_type)
    shards, rank = dist.get_world_size(), dist.get_rank()
    config = checkpoint.config
    _check_shards(config, shards)
    small = checkpoint.shard_parameters(shards) < SMALL_MODEL
    arithmetic = choose_arithmetic(
        device_type,
        options.dtype,
        config.quantization if options.quantize == "auto" else options.quantize,
        small=small,
    )
    arithmetic.check(config, shards)
    dtype = arithmetic.dtype
    distributed.use_threads(options.threads or (1 if small else None))

    weights = arithmetic.shard_bytes(checkpoint, shards)
    neighbours = 1 if device.type == "cuda" else distributed.local_world_size()
    token = _cache_shape(config, shards, blocks=1, block_size=1).bytes(dtype)
    affordable = distributed.least(
        cache_tokens(device, neighbours, weights=weights, bytes_per_token=token)
    )
    limits = _limits(options, config, affordable)
    cache = _cache_shape(config, shards, limits.blocks + PROBE_BLOCKS, limits.block_size)
    memory = MemoryPlan(
        weights=weights,
        kv_cache=cache.bytes(dtype),
        kv_tokens=limits.blocks * limits.block_size,
    )
    if rank == LEADER:
        _log.info("%s: %s", options.ckpt_dir, _summary(checkpoint, shards, arithmetic, memory))
    memory.check(device, neighbours)
    # No rank allocates before every rank has measured what is free.
    dist.barrier()

    network = load_network(
        config,
        limits.context_length,
        checkpoint.read_shard(
            rank, shards, dtype if arithmetic.quantization == "none" else torch.float32, device
        ),
        pack=packing(arithmetic.quantization, dtype, device),
        dtype=dtype,
        device=device,
    )
    runner = ModelRunner(network, SdpaAttention(cache, dtype, device), PlanChannel(), device)
    info = ModelInfo(
        name=options.model_name or options.ckpt_dir.resolve().name,
        parameters=checkpoint.parameters,
        vocab_size=config.vocab_size,
        context_length=limits.context_length,
        shards=shards,
        dtype=arithmetic.dtype_name,
        quantization=arithmetic.quantization,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        fingerprint=_fingerprint(checkpoint, shards, arithmetic),
        max_batch_size=limits.max_batch_size,
    )
    return Replica(info, limits, runner, is_leader=rank == LEADER)


def _check_shards(config: ModelConfig, shards: int) -> None:
    indivisible = config.indivisible_by(shards)
    if indivisible:
        raise StartError(
            f"{shards} shards do not divide {', '.join(indivisible)} of this checkpoint: "
            "start a number of processes (--nproc_per_node) that does"
        )


def _cache_shape(config: ModelConfig, shards: int, blocks: int, block_size: int) -> CacheShape:
    return CacheShape(
        layers=config.n_layers,
        blocks=blocks,
        block_size=block_size,
        kv_heads=config.kv_heads // shards,
        head_dim=config.head_dim,
    )


def _limits(options: ReplicaOptions, config: ModelConfig, affordable: int) -> EngineLimits:
    """The engine's limits; `affordable` is how many tokens the cache has memory for."""
    most = MOST_CACHE * options.max_batch_size * options.max_seq_len
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
    )


def _summary(
    checkpoint: WeightSource, shards: int, arithmetic: Arithmetic, memory: MemoryPlan
) -> str:
    return (
        f"{_count(checkpoint.parameters)}, {arithmetic}, "
        f"{shards} shard{'s, each' if shards > 1 else ','} {memory}"
    )


def _count(parameters: int) -> str:
    """As models are called: 13B, 3.9M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.{0 if parameters >= 10 * size else 1}f}{letter}"
    return str(parameters)


def _fingerprint(checkpoint: WeightSource, shards: int, arithmetic: Arithmetic) -> str:
    identity = f"{checkpoint.fingerprint()} {shards} {arithmetic}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
