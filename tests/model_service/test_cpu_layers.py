"""All layers in one call of the compiled library, compared with one call for each operation."""

from pathlib import Path

import pytest
import torch

from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.cpu.kernels import without_kernels
from model_service.model.network import Transformer
from tests.model_service.conftest import golden_for
from tests.model_service.step_logits import WHOLE, logits

STEPS = [(5, 40, 33, 0), (0, 1, 0, 1), (0, 7, 0, 0)]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(bool(without_kernels()), reason=without_kernels()),
]


@pytest.fixture(params=["float32", "bfloat16", "float32 int8", "bfloat16 int4"])
def network(request: pytest.FixtureRequest, golden: Path) -> Transformer:
    dtype, quantize = [*request.param.split(), "none"][:2]
    folder = golden / "checkpoints" / golden_for(quantize)
    options = ReplicaOptions(folder, 256, dtype=dtype, quantize=quantize, device="cpu")
    return load_replica(options).runner._network


def test_one_call_computes_what_single_operations_do(network: Transformer) -> None:
    assert network.compiled_layers is not None
    together = logits(network, STEPS)
    network.compiled_layers = None
    assert all(map(torch.equal, logits(network, WHOLE), together))


def test_shards_add_up_after_each_half_of_a_layer(
    network: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = logits(network, WHOLE)
    added: list[torch.Tensor] = []
    monkeypatch.setattr(network.compiled_layers, "_sum_over_shards", added.append)
    assert all(map(torch.equal, logits(network, WHOLE), together))
    assert len(added) == 2 * len(network.layers)
