"""Logits of the whole network, bit for bit, in steps of every composition."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Determinism
from model_service.model.attention.backend import CacheShape, SequenceSpan
from model_service.model.attention.select import make_attention
from model_service.model.network import Transformer
from tests.model_service.conftest import CPU, spread

LENGTHS = (5, 90, 33, 1)  # tokens of the sequences
WHOLE = [LENGTHS]  # all of them in one step
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = [torch.randint(3, 250, (length,), generator=GENERATOR) for length in LENGTHS]
pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def networks(golden: Path) -> Iterator[Callable[..., Transformer]]:
    threads = torch.get_num_threads()

    def load(dtype: Any, quantize: Any = "none") -> Transformer:
        folder = golden / "checkpoints" / "gqa-mp1"
        options = ReplicaOptions(folder, 256, dtype=dtype, quantize=quantize, device="cpu")
        replica = load_replica(options)
        if dtype == "bfloat16" and replica.info.determinism is Determinism.SEEDED:
            pytest.skip("this processor has no kernels, or they were not compiled")
        return replica.runner._network

    yield load
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["none", "int8", "int4"])
def network(request: pytest.FixtureRequest, networks: Callable[..., Transformer]) -> Transformer:
    return networks("bfloat16", request.param)


def logits(
    network: Transformer,
    steps: Sequence[Sequence[int]],
    block_size: int = 16,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Logits [length, vocab] of each sequence, computed in steps of so many tokens of each."""
    dtype = network.get_parameter("norm.weight").dtype
    layer: Any = network.get_submodule("layers.0.attention")
    blocks = 1 + sum(-(-length // block_size) for length in LENGTHS)
    shape = CacheShape(len(network.layers), blocks, block_size, layer.kv_heads, layer.head_dim)
    backend = make_attention(shape, dtype, CPU, dtype, heads=layer.heads, max_batch_size=4)
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


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(
        st.tuples(*(st.sampled_from([0, 0, 1, 2, 7, 40]) for _ in LENGTHS)), max_size=60
    ),
    block_size=st.sampled_from([4, 16, 24, 64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_tokens_logits_depend_on_its_context_alone(
    network: Transformer,
    steps: Sequence[Sequence[int]],
    block_size: int,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(1)
    expected = logits(network, WHOLE)
    torch.set_num_threads(threads)
    found = logits(network, steps, block_size, seed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_differ_from_float32_by_rounding(networks: Callable[..., Transformer]) -> None:
    exact = torch.cat(logits(networks("float32"), WHOLE))
    error = torch.cat(logits(networks("bfloat16"), WHOLE)) - exact
    assert error.norm() < 0.02 * exact.norm()
