"""Logits of a few sequences on a network in steps of any composition, and those of an engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model_service.engine import engine
from model_service.engine.sampling.host.step_sampling import HostSampling
from model_service.engine.step.batch import LogitRow
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.select import make_attention
from model_service.model.cpu.layers import Scan
from model_service.model.network import Transformer
from tests.model_service.conftest import CPU, spread

LENGTHS = (5, 90, 33, 1)  # tokens of the sequences
WHOLE = [LENGTHS]  # all of them in one step
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = [torch.randint(3, 250, (length,), generator=GENERATOR) for length in LENGTHS]


def heads(network: Transformer) -> int:
    """Query heads of this rank."""
    layer: Any = network.get_submodule("layers.0.attention")
    return int(layer.heads)


def cache_shape(network: Transformer, blocks: int, block_size: int) -> CacheShape:
    layer: Any = network.get_submodule("layers.0.attention")
    norm = network.get_parameter("norm.weight")
    projections = F.linear(torch.zeros_like(norm).unsqueeze(0), layer.wqkv.weight).shape[1]
    kv_heads = (projections // layer.head_dim - layer.heads) // 2
    return CacheShape(len(network.layers), blocks, block_size, kv_heads, layer.head_dim)


def logits(
    network: Transformer,
    steps: Sequence[Sequence[int]],
    block_size: int = 16,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Logits [length, vocab] of each sequence, computed in steps of so many tokens of each."""
    dtype = network.get_parameter("norm.weight").dtype
    blocks = 1 + sum(-(-length // block_size) for length in LENGTHS)
    shape = cache_shape(network, blocks, block_size)
    backend = make_attention(shape, dtype, CPU, dtype, heads=heads(network), max_batch_size=4)
    tables = [span.block_table for span in spread(LENGTHS, LENGTHS, shape, seed)]
    done = [0] * len(LENGTHS)
    outputs: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    for step in [*steps, LENGTHS]:  # the last one computes what is left
        ends = [min(done[i] + n, LENGTHS[i]) for i, n in enumerate(step)]
        live = [i for i in range(len(LENGTHS)) if ends[i] > done[i]]
        if not live:
            continue
        parts = [slice(done[i], ends[i]) for i in live]
        backend.plan([SequenceSpan(ends[i] - done[i], ends[i], tables[i]) for i in live])
        tokens = torch.cat([TOKENS[i][part] for i, part in zip(live, parts, strict=True)])
        positions = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        computed = network(tokens, positions, None, backend)
        computed = computed.split([part.stop - part.start for part in parts])
        for i, rows in zip(live, computed, strict=True):
            outputs[i].append(rows)
            done[i] = ends[i]
    return [torch.cat(each) for each in outputs]


@contextmanager
def recorded_logits() -> Iterator[list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Collects the logits [vocab] that engines sample from, each with the tokens before it."""
    recorded: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def record(rows: list[LogitRow], logits: torch.Tensor, scan: Scan | None) -> HostSampling:
        for row, values in zip(rows, logits, strict=True):
            known = row.sequence.tokens[: row.position]
            drafts = row.drafts[: row.position - len(known)]
            recorded.append(((*known, *drafts), values.clone()))
        return HostSampling(rows, logits, scan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "HostSampling", record)
        yield recorded
