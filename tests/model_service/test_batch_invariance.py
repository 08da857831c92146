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
from model_service.model.network import Transformer
from tests.model_service.step_logits import LENGTHS, WHOLE, logits

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def networks(golden: Path) -> Iterator[Callable[..., Transformer]]:
    threads = torch.get_num_threads()

    def load(dtype: Any, quantize: Any = "none") -> Transformer:
        folder = golden / "checkpoints" / "gqa-mp1"
        options = ReplicaOptions(folder, 256, dtype=dtype, quantize=quantize, device="cpu")
        replica = load_replica(options)
        if replica.info.determinism is Determinism.SEEDED:
            pytest.skip("this processor has no kernels, or they were not compiled")
        return replica.runner._network

    yield load
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=["float32", "bfloat16", "float32 int8", "float32 int4", "bfloat16 int8"],
)
def network(request: pytest.FixtureRequest, networks: Callable[..., Transformer]) -> Transformer:
    return networks(*request.param.split())


@settings(max_examples=12, deadline=None)
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
