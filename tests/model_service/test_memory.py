import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading.first_steps.step_memory import memory_for_steps
from model_service.loading.first_steps.warm_up import warm_up_plans
from model_service.loading.layout import MAX_CACHE
from model_service.loading.load_replica import load_replica
from model_service.loading.memory import WORKING_MEMORY, MemoryPlan, cache_tokens, free_memory
from model_service.loading.options import ReplicaOptions
from model_service.model.attention.backend import CacheShape
from model_service.model.attention.sdpa import SdpaAttention
from serving.errors import StartError

CPU = torch.device("cpu")


def test_the_cache_may_take_half_of_what_the_weights_leave_on_the_cpu() -> None:
    free = free_memory(CPU)
    tokens = cache_tokens(CPU, 1, weights=free // 4, bytes_per_token=1000)
    # Other processes come and go while this runs.
    assert tokens * 1000 == pytest.approx((free * 3 / 4 - WORKING_MEMORY) / 2, rel=0.2)


def test_shards_on_one_machine_share_its_memory() -> None:
    one, four = (cache_tokens(CPU, n, weights=0, bytes_per_token=1000) for n in (1, 4))
    quarter = (one * 2000 + WORKING_MEMORY) / 4
    assert four * 2000 + WORKING_MEMORY == pytest.approx(quarter, rel=0.2)


def test_weights_that_leave_nothing_leave_no_cache() -> None:
    assert cache_tokens(CPU, 1, weights=2**60, bytes_per_token=1000) == 0


@pytest.fixture
def options(golden: Path) -> ReplicaOptions:
    return ReplicaOptions(
        golden / "checkpoints" / "gqa-mp1", max_seq_len=64, max_batch_size=2, device="cpu"
    )


def test_a_cache_of_no_given_size_holds_the_running_sequences_many_times(
    options: ReplicaOptions,
) -> None:
    limits = load_replica(options).limits
    assert limits.blocks * limits.block_size == MAX_CACHE * 2 * 64


@pytest.mark.parametrize(("free_tokens", "tokens"), [(1000, 500), (100, 64)])
def test_a_cache_takes_half_of_scarce_memory_but_holds_one_sequence(
    options: ReplicaOptions, monkeypatch: Any, free_tokens: int, tokens: int
) -> None:
    of_token, of_weights = 768, 238016 * 4
    free = WORKING_MEMORY + of_weights + free_tokens * of_token
    monkeypatch.setattr("model_service.loading.memory.free_memory", lambda _device: free)
    limits = load_replica(dataclasses.replace(options, block_size=1)).limits
    assert limits.blocks == tokens


def test_memory_for_less_than_one_sequence_is_refused(
    options: ReplicaOptions, monkeypatch: Any
) -> None:
    monkeypatch.setattr("model_service.loading.memory.free_memory", lambda _device: WORKING_MEMORY)
    with pytest.raises(StartError, match="To fix: lower --kv_cache_tokens"):
        load_replica(options)


def test_weights_that_are_there_are_not_asked_for_again(monkeypatch: Any) -> None:
    monkeypatch.setattr("model_service.loading.memory.free_memory", lambda _device: 500)
    plan = MemoryPlan(weights=1000, kv_cache=400, kv_tokens=10, working=100)
    plan.check(CPU, 1, weights_are_there=True)
    with pytest.raises(StartError, match=r"would need 0\.001 MiB .* but 0\.000 MiB are free"):
        plan.check(CPU, 1)


def test_running_out_of_memory_for_steps_says_what_to_lower(options: ReplicaOptions) -> None:
    limits = load_replica(options).limits
    with (
        pytest.raises(StartError, match=r"steps of 512 tokens .* lower --kv_cache_tokens"),
        memory_for_steps(limits, CPU),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_largest_steps_reach_every_limit_in_the_probe_block_alone(
    options: ReplicaOptions,
) -> None:
    replica = load_replica(dataclasses.replace(options, max_step_tokens=150))
    heads = CacheShape(layers=3, blocks=1, block_size=16, kv_heads=4, head_dim=8)
    attention = SdpaAttention(heads, torch.float32, CPU)
    runner = ModelRunner(replica.runner._network, attention, PlanChannel(), CPU)
    plans = warm_up_plans(replica.limits)
    assert [span.query_length for span in plans["prompts"].spans] == [64, 64, 22]
    assert [span.context_length for span in plans["decode"].spans] == [64, 64]
    for name, rows in (("prompts", 150), ("decode", 2), ("both", 150)):
        plan = plans[name]
        assert runner.warm_up(plan).shape == (rows, replica.limits.vocab_size)
