"""A step or all layers in one call of the compiled library, beside one call per operation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model_service.engine.sampling.host.sampler import finite_rows
from model_service.engine.step.plan import StepPlan
from model_service.engine.step.runner import ModelRunner
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.attention.backend import SequenceSpan
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
def runner(request: pytest.FixtureRequest, golden: Path) -> ModelRunner:
    dtype, quantize = [*request.param.split(), "none"][:2]
    folder = golden / "checkpoints" / golden_for(quantize)
    options = ReplicaOptions(folder, 256, dtype=dtype, quantize=quantize, device="cpu")
    return load_replica(options).runner


@pytest.fixture
def network(runner: ModelRunner) -> Transformer:
    return runner._network


def plan(wanted: list[int]) -> StepPlan:
    """A step of a prompt, the rest of a prompt and a last token, in that order."""
    spans = (
        SequenceSpan(20, 20, [3, 1]),
        SequenceSpan(5, 37, [2, 9, 4]),
        SequenceSpan(1, 6, [7]),
    )
    tokens = np.arange(3, 29, dtype=np.int32)
    return StepPlan(spans, tokens, np.array(wanted, dtype=np.int32))


def fill_cache(runner: ModelRunner) -> None:
    """Computes what the queries of `plan` attend to."""
    for span in plan([]).spans:
        context = span.context_length
        whole = (SequenceSpan(context, context, span.block_table),)
        tokens = np.arange(context, dtype=np.int32)
        runner.warm_up(StepPlan(whole, tokens, np.zeros(0, dtype=np.int32)))


@pytest.mark.parametrize("wanted", [[], [25], [19, 24, 25], [*range(26)]], ids=len)
def test_a_step_in_one_call_computes_what_its_parts_do(
    runner: ModelRunner, wanted: list[int]
) -> None:
    fill_cache(runner)
    together = runner.warm_up(plan(wanted)).clone()
    scan = runner.scan
    assert scan is not None
    runner._run_step = None
    parts = runner.warm_up(plan(wanted))
    assert runner.scan is None
    assert together.shape == (len(wanted), runner._network.vocab_size)
    assert torch.equal(together, parts)
    assert scan.largest == parts.argmax(dim=-1).tolist()
    assert scan.finite == [True] * len(wanted)


def test_a_step_in_one_call_tells_which_logits_are_not_finite(runner: ModelRunner) -> None:
    fill_cache(runner)
    embedding = runner._network.get_parameter("tok_embeddings.weight")
    embedding[plan([]).tokens[25]] = torch.inf
    logits = runner.warm_up(plan([19, 24, 25]))
    assert runner.scan is not None
    assert runner.scan.finite == [True, True, False] == finite_rows(logits)


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
