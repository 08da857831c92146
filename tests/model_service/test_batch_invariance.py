"""Logits bit for bit, in steps of every composition and under all settings of the engine.

Each precision is tested on replicas that call themselves batch-invariant.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from model_service.engine.engine import Engine
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.engine.step.plan_channel import PlanChannel
from model_service.engine.step.runner import ModelRunner
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Determinism
from model_service.loading.replica import Replica
from model_service.model.attention.select import make_attention
from model_service.model.network import Transformer
from tests.model_service.conftest import CPU, golden_for
from tests.model_service.step_logits import (
    LENGTHS,
    WHOLE,
    cache_shape,
    heads,
    logits,
    recorded_logits,
)

CONTEXT = 128
LENGTH = 20  # tokens of each answer
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}


def load(golden: Path, precision: str) -> Replica:
    folder = golden / "checkpoints" / golden_for(precision)
    return load_replica(ReplicaOptions(folder, CONTEXT, device="cpu", **PRECISIONS[precision]))


def network_of(replica: Replica) -> Transformer:
    return replica.runner._network


@pytest.fixture(scope="module", params=PRECISIONS)
def replica(golden: Path, request: pytest.FixtureRequest) -> Iterator[Replica]:
    threads = torch.get_num_threads()
    replica = load(golden, request.param)
    if replica.info.determinism is Determinism.SEEDED:
        pytest.skip(f"{request.param} is not batch-invariant here")
    yield replica
    torch.set_num_threads(threads)


@pytest.mark.kernels
@settings(max_examples=12)
@given(
    steps=st.lists(
        st.tuples(*(st.sampled_from([0, 0, 1, 2, 7, 40]) for _ in LENGTHS)), max_size=60
    ),
    block_size=st.sampled_from([4, 16, 24, 64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_tokens_logits_depend_on_its_context_alone(
    replica: Replica,
    steps: Sequence[Sequence[int]],
    block_size: int,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(1)
    expected = logits(network_of(replica), WHOLE)
    torch.set_num_threads(threads)
    found = logits(network_of(replica), steps, block_size, seed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def requests() -> list[GenerationRequest]:
    """Greedy and sampled ones, whose prompts part within blocks of any size; one repeats itself."""
    text = tuple(3 + i * 7 % 230 for i in range(90))
    prompts = [text[:50], text[:50], (*text[:37], 5, 6), text[:90], (*text[:9], 8)]
    greedy, sampled = SamplingParams(temperature=0.0), SamplingParams(1.0, top_p=1.0, seed=1)
    repeating = dataclasses.replace(greedy, logit_bias={7: 100.0})
    sampling = [greedy, sampled, repeating, sampled, greedy]
    return [
        GenerationRequest(number, (1, *prompt), LENGTH, params, prompt_logprobs=number == 4)
        for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
    ]


def make_engine(replica: Replica, **changes: Any) -> Engine:
    """An engine on the replica's network with limits and a cache of its own."""
    limits = dataclasses.replace(replica.limits, **changes)
    network = network_of(replica)
    dtype = network.get_parameter("norm.weight").dtype
    shape = cache_shape(network, limits.blocks + 1, limits.block_size)
    attention = make_attention(
        shape, dtype, CPU, dtype, heads=heads(network), max_batch_size=limits.max_batch_size
    )
    return Engine(ModelRunner(network, attention, PlanChannel(), CPU), limits)


@dataclass(frozen=True)
class Alone:
    """The answer to each request on its own, and the logits [vocab] on the way by their context."""

    answers: dict[Any, list[int]] = field(default_factory=dict)
    logits: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def alone(replica: Replica, run: Any) -> Alone:
    torch.set_num_threads(1)
    alone = Alone()
    for request in requests():
        engine = make_engine(replica, prefix_cache=False, draft_tokens=0)
        with recorded_logits() as steps:
            made = run(engine, [request])[request.request_id]
        alone.answers[request.request_id] = made.ids[-LENGTH:]  # perhaps behind the prompt's
        alone.logits.update(steps)
    return alone


@dataclass(frozen=True)
class Settings:
    """How an engine is to run, and in which way it continues."""

    batch: int
    step_tokens: int
    block_size: int
    preempt: bool
    prefix_cache: bool
    drafts: int
    threads: int
    moved: bool  # whether the second half of each answer is made by a later request

    def engine(self, replica: Replica) -> Engine:
        return make_engine(
            replica,
            max_batch_size=self.batch,
            max_step_tokens=self.step_tokens,
            block_size=self.block_size,
            blocks=-(-CONTEXT // self.block_size) * (1 if self.preempt else 16),
            prefix_cache=self.prefix_cache,
            draft_tokens=self.drafts,
        )


CROWDED = Settings(
    batch=8,
    step_tokens=512,
    block_size=16,
    preempt=True,
    prefix_cache=True,
    drafts=8,
    threads=1,
    moved=False,
)
CONTINUED = dataclasses.replace(
    CROWDED, step_tokens=19, block_size=4, preempt=False, threads=2, moved=True
)


@settings(max_examples=2, phases=(Phase.explicit, Phase.generate))
@given(
    how=st.builds(
        Settings,
        batch=st.sampled_from([1, 3, 8]),
        step_tokens=st.sampled_from([8, 19, 512]),
        block_size=st.sampled_from([4, 16, 24]),
        preempt=st.booleans(),
        prefix_cache=st.booleans(),
        drafts=st.sampled_from([0, 1, 8]),
        threads=st.just(1),  # the test above varies them
        moved=st.booleans(),
    )
)
@example(CROWDED)
@example(CONTINUED)
def test_the_engine_decides_when_logits_are_computed_and_never_which(
    replica: Replica, alone: Alone, run: Any, how: Settings
) -> None:
    torch.set_num_threads(how.threads)
    engine = how.engine(replica)
    again = [moved(each, alone) if how.moved else each for each in requests()]
    with pytest.MonkeyPatch.context() as patch, recorded_logits() as steps:
        # Drafts are worth it, no matter how long steps take.
        patch.setattr(PrefillBudget, "cost", lambda _budget, rows: 0.1 / rows)
        cold, warm = run(engine, requests()), run(engine, again)
    for number, expected in alone.answers.items():
        assert cold[number].ids[-LENGTH:] == expected
        length = LENGTH - again[number].offset
        assert warm[number].ids[-length:] == expected[-length:]
    compared = [(found, alone.logits[at]) for at, found in steps if at in alone.logits]
    assert len(compared) > LENGTH * len(alone.answers)
    assert all(torch.equal(found, logits) for found, logits in compared)
    if how in (CROWDED, CONTINUED):
        load = engine.load()
        assert load.cached_prompt_tokens
        assert load.accepted_tokens
        assert bool(load.preemptions) is how.preempt


def moved(request: GenerationRequest, alone: Alone) -> GenerationRequest:
    """The request as another replica gets it after half of its answer."""
    made = tuple(alone.answers[request.request_id][: LENGTH // 2])
    return dataclasses.replace(
        request, prompt_ids=request.prompt_ids + made, offset=len(made), prompt_logprobs=False
    )


@pytest.mark.kernels
def test_bfloat16_differs_from_float32_by_rounding(golden: Path) -> None:
    exact, rounded = (
        torch.cat(logits(network_of(load(golden, precision)), WHOLE))
        for precision in ("float32", "bfloat16")
    )
    assert (rounded - exact).norm() < 0.02 * exact.norm()
