"""The answers of a replica with recorded steps, then of one without, as JSON; run as several ranks.

FlashInfer's stand-in attends, and tapes stand in for CUDA graphs.
"""

import dataclasses
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model_service.engine.engine import Engine
from model_service.engine.limits import EngineLimits
from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading import distributed
from model_service.model import network as network_module
from model_service.model.attention.backend import CacheShape
from model_service.model.config import ModelConfig
from model_service.model.graphs.decode_graphs import DecodeGraphs
from model_service.model.graphs.piecewise_graphs import PiecewiseGraphs
from model_service.model.graphs.step_graphs import StepGraphs
from model_service.model.load_network import load_network
from model_service.model.network import Transformer
from model_service.model.operations import FusedOperations, rotary_frequencies
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.packing import plain
from model_service.model.weights.source import Shard
from tests.model_service import flashinfer_double
from tests.model_service.conftest import CONTEXT, CPU
from tests.model_service.lookahead_ranks import answers
from tests.model_service.recorders import Rerun, TapeRecorder

LIMITS = EngineLimits(
    context_length=CONTEXT,
    vocab_size=0,
    max_batch_size=6,
    max_step_tokens=64,
    blocks=400,
    block_size=4,
    prefix_cache=True,
    max_stall=1.7,
    draft_tokens=0,
    lookahead=False,
)


def network_by_pytorch(folder: Path) -> tuple[Transformer, ModelConfig]:
    """A rank's part, in which every operation is PyTorch's, so that a tape sees it."""
    distributed.initialize("cpu")
    source = open_weights(folder)
    config = source.config
    shard = Shard(dist.get_rank(), dist.get_world_size(), torch.float32, CPU)
    network = load_network(
        config,
        CONTEXT,
        partial(source.read_shard, shard),
        pack=plain,
        dtype=torch.float32,
        device=CPU,
    )
    network.compiled_layers = None
    network._operations = FusedOperations(rotary_frequencies(config.head_dim, CONTEXT))
    return network, config


def main(folder: str) -> None:
    sys.modules["flashinfer"] = flashinfer_double
    backend: Any = importlib.import_module("model_service.model.attention.flashinfer")
    network, config = network_by_pytorch(Path(folder))
    record, shards = TapeRecorder(), dist.get_world_size()
    # Sums over shards are graphs' kernels on CUDA, but no operations of PyTorch's.
    network_module.sum_over_shards = partial(record.call, network_module.sum_over_shards)
    network._gather = partial(record.call, network._gather)
    limits = dataclasses.replace(LIMITS, vocab_size=config.vocab_size)
    shape = CacheShape(
        config.n_layers,
        limits.blocks + 1,
        limits.block_size,
        config.kv_heads // shards,
        config.head_dim,
    )
    attention = backend.FlashInferAttention(
        shape, torch.float32, CPU, torch.float32, heads=config.n_heads // shards, max_batch_size=8
    )
    decode = DecodeGraphs(
        network,
        attention,
        max_batch_size=limits.max_batch_size,
        context_length=CONTEXT,
        device=CPU,
        record=Rerun(),
    )
    pieces = PiecewiseGraphs(
        network, attention, max_step_tokens=limits.max_step_tokens, device=CPU, record=record
    )
    recorded = ModelRunner(network, attention, PlanChannel(), CPU, StepGraphs(decode, pieces))
    plainly = ModelRunner(network, attention, PlanChannel(), CPU)
    for runner in (recorded, plainly):
        if dist.get_rank():
            runner.follow()
        else:
            print(json.dumps(answers(Engine(runner, limits))), flush=True)
            runner.release_followers()


if __name__ == "__main__":
    main(sys.argv[1])
