"""Padding, buckets and buffers of recorded decode steps, on the CPU: there a record is the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.engine import Engine
from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading.first_steps.warm_up import warm_up
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.replica import Replica
from model_service.model.attention.backend import CacheShape
from model_service.model.graphs.decode_graphs import DecodeGraphs, bucket_sizes
from model_service.model.graphs.step_graphs import StepGraphs
from model_service.model.operations import FusedOperations, rotary_frequencies
from tests.model_service.conftest import CONTEXT, CPU, GOLDEN, spread
from tests.model_service.recorders import Rerun

ROWS, HEADS = 12, 8  # of gqa-mp1
SHAPE = CacheShape(layers=3, blocks=120, block_size=4, kv_heads=4, head_dim=8)


def load(**changes: Any) -> Replica:
    folder: Path = GOLDEN / "checkpoints" / "gqa-mp1"
    return load_replica(ReplicaOptions(folder, CONTEXT, dtype="float32", device="cpu", **changes))


@pytest.fixture(scope="module")
def network() -> Any:
    return load().runner._network


def record(network: Any, attention: Any, rows: int = ROWS) -> DecodeGraphs:
    return DecodeGraphs(
        network,
        attention,
        max_batch_size=rows,
        context_length=CONTEXT,
        device=CPU,
        record=Rerun(),
    )


def caches(attention: Any) -> list[torch.Tensor]:
    """Keys and values [layers, blocks, …]."""
    held = getattr(attention, "_cache", attention)
    return [each.view(SHAPE.layers, SHAPE.blocks, -1) for each in (held._keys, held._values)]


def filled(attention: Any) -> Any:
    for cache in caches(attention):
        cache.normal_(generator=torch.Generator().manual_seed(1))
    return attention


@pytest.fixture(scope="module", params=["sdpa", "flashinfer"])
def pair(request: Any, backends: Any, network: Any) -> tuple[Any, Any, DecodeGraphs]:
    """A backend to run plainly, one to run padded, and the records of that."""
    plain, padded = (backends[request.param](SHAPE, HEADS) for _ in range(2))
    return plain, padded, record(network, padded)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=ROWS), seed=st.integers(0, 1000))
def test_padding_changes_no_logits_and_no_block_of_a_sequence(
    network: Any, pair: Any, lengths: list[int], seed: int
) -> None:
    plain, padded, graphs = filled(pair[0]), filled(pair[1]), pair[2]
    spans = spread(lengths, [1] * len(lengths), SHAPE, seed)
    tokens = torch.randint(0, 100, (len(spans),), generator=torch.Generator().manual_seed(seed))
    positions, rows = torch.tensor(lengths) - 1, torch.arange(len(spans))
    plain.plan(spans)
    expected = network(tokens, positions, rows, plain)
    logits = graphs.forward(spans, tokens, positions, rows)
    # Products of another number of rows add in another order.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(caches(padded), caches(plain), strict=True):
        torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=1e-4, rtol=1e-4)


def test_only_the_wanted_rows_come_back(pair: Any) -> None:
    spans = spread([5, 9, 2], [1] * 3, SHAPE, seed=2)
    arguments = spans, torch.tensor([7, 8, 9]), torch.tensor([4, 8, 1])
    every = pair[2].forward(*arguments, torch.arange(3)).clone()
    assert torch.equal(pair[2].forward(*arguments, torch.tensor([0, 2])), every[[0, 2]])


@pytest.mark.parametrize(("count", "query"), [(ROWS + 1, 1), (2, 3)])
def test_what_was_not_recorded_is_left_to_the_plain_path(pair: Any, count: int, query: int) -> None:
    spans = spread([query] * count, [query] * count, SHAPE, seed=0)
    tokens = torch.zeros(count * query, dtype=torch.long)
    assert pair[2].forward(spans, tokens, tokens, tokens[:1]) is None


@given(st.integers(1, 1024))
def test_buckets_reach_the_largest_batch_and_waste_little(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for below, size in zip([0, *sizes], sizes, strict=False):
        assert size - below - 1 <= max(7, size // 8)


@pytest.mark.parametrize("rows", [1, 5])
def test_warm_up_touches_no_block_of_a_sequence(network: Any, pair: Any, rows: int) -> None:
    limits = load(max_batch_size=rows, max_step_tokens=300, block_size=SHAPE.block_size).limits
    backend = filled(pair[0])
    before = [cache.clone() for cache in caches(backend)]
    runner = ModelRunner(network, backend, PlanChannel(), CPU)
    warm_up(runner, limits)
    for cache, as_it_was in zip(caches(backend), before, strict=True):
        assert torch.equal(cache[:, 1:], as_it_was[:, 1:])
        assert not torch.equal(cache[:, 0], as_it_was[:, 0])


@pytest.mark.parametrize("name", ["sdpa", "in parts", "flashinfer"])
def test_golden_cases_in_padded_steps(
    backends: Any, cases: Any, request_for: Any, run: Any, name: str
) -> None:
    replica = load(max_batch_size=40, draft_tokens=4, block_size=SHAPE.block_size)
    network: Any = replica.runner._network
    shape = CacheShape(3, replica.limits.blocks + 1, SHAPE.block_size, 4, 8)
    attention = backends[name](shape, HEADS)
    if name == "flashinfer":
        network._operations = FusedOperations(rotary_frequencies(8, CONTEXT))
    graphs = StepGraphs(record(network, attention, rows=40), None)
    runner = ModelRunner(network, attention, PlanChannel(), CPU, graphs)
    warm_up(runner, replica.limits)
    golden = cases("gqa")
    answers = run(Engine(runner, replica.limits), [request_for(case) for case in golden])
    assert [answers[case["id"]].ids for case in golden] == [case["ids"] for case in golden]
    for case in golden:
        assert answers[case["id"]].logprobs == pytest.approx(case["logprobs"], abs=1e-4)
