"""One of several ranks: prints, as JSON, the sums and logits that depend on the other rows."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group

from bench.checkpoint import RandomWeights
from model_service.loading import distributed
from model_service.loading.load_replica import load_replica
from model_service.loading.options import Dtype, Quantize, ReplicaOptions
from model_service.loading.precision import Determinism
from model_service.model.config import ModelConfig
from model_service.model.cpu.shard_sum import MAX_GATHERED_BYTES, sum_over_shards
from tests.model_service.step_logits import LENGTHS, WHOLE, logits

# Four shards divide it, also with 4-bit weights.
CONFIG = ModelConfig(dim=256, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=128)
ROWS = 600
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
QUANTIZE: tuple[Quantize, ...] = ("none", "int8", "int4")
STEPS = {
    "token by token": [[1] * len(LENGTHS)] * max(LENGTHS),
    "one after the other": [[n * (i == j) for j, n in enumerate(LENGTHS)] for i in range(4)],
    "in chunks": [[7, 7, 0, 0]] * 6,
}


def different_sums() -> Iterator[str]:
    """The sums that are not those of all ranks' terms in float32, in the order of the ranks."""
    for dtype in (torch.float32, torch.bfloat16):
        parts = [
            torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(rank)).to(dtype)
            for rank in range(dist.get_world_size())
        ]
        assert parts[0].nbytes > MAX_GATHERED_BYTES
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        for rows in (1, 7, ROWS):
            x = parts[dist.get_rank()][-rows:].clone()
            sum_over_shards(x, get_model_parallel_group())
            if not torch.equal(x, total[-rows:].to(dtype)):
                yield f"sum of {rows} rows in {dtype}"


def different_logits(dtype: Dtype, quantize: Quantize) -> Iterator[str]:
    """The ways to compute logits that differ from a single step for all tokens."""
    options = ReplicaOptions(Path("random"), 256, dtype=dtype, quantize=quantize, device="cpu")
    replica = load_replica(options, RandomWeights(CONFIG))
    if replica.info.determinism is Determinism.SEEDED:
        return
    invariant.append(f"{dtype} {quantize}")
    network = replica.runner._network
    expected = logits(network, WHOLE)
    for way, steps in STEPS.items():
        found = logits(network, steps, block_size=24, seed=1)
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            yield f"{dtype} {quantize} {way}"


distributed.initialize("cpu")
invariant: list[str] = []
differ = list(different_sums())
for precision in itertools.product(DTYPES, QUANTIZE):
    differ += different_logits(*precision)
# In one write, so that the lines of the ranks stay apart.
sys.stdout.write(json.dumps({"differ": differ, "invariant": invariant}) + "\n")
