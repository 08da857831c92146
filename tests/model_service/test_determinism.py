"""Replays in every precision, compared with the determinism that the replica claims."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_service.engine.engine import Engine
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.loading.precision import Determinism
from model_service.loading.replica import Replica
from tests.model_service.conftest import golden_for

LENGTH = 48  # tokens of each answer
SIXTEEN_BLOCKS = 16  # one sequence of full length: six that run at once must give way
Answers = dict[Any, list[int]]


@pytest.fixture(params=["float32", "bfloat16", "float32 int8", "float32 int4"])
def replica(request: pytest.FixtureRequest, golden: Path) -> Replica:
    dtype, *quantize = request.param.split()
    return load_replica(
        ReplicaOptions(
            golden / "checkpoints" / golden_for(request.param),
            max_seq_len=256,
            dtype=dtype,
            quantize=quantize[0] if quantize else "none",
            device="cpu",
        )
    )


@pytest.fixture
def requests(cases: Any) -> list[GenerationRequest]:
    """Sampled at a temperature of 1 from the whole vocabulary; nothing but the length ends them."""
    return [
        GenerationRequest(
            seed, tuple(case["prompt_ids"]), LENGTH, SamplingParams(1.0, top_p=1.0, seed=seed)
        )
        for seed, case in enumerate(cases("gqa")[:6])
    ]


@pytest.fixture
def answer(replica: Replica, run: Any) -> Callable[..., Answers]:
    """Runs requests on a fresh engine whose limits are changed as given."""

    def answer(requests: list[GenerationRequest], **limits: Any) -> Answers:
        changed = dataclasses.replace(replica.limits, **{"draft_tokens": 0} | limits)
        engine = Engine(replica.runner, changed)
        answers = {name: made.ids for name, made in run(engine, requests).items()}
        assert bool(engine.load().preemptions) is (changed.blocks == SIXTEEN_BLOCKS)
        return answers

    return answer


def moved(request: GenerationRequest, made: list[int]) -> GenerationRequest:
    """The request as another replica gets it after half of its answer."""
    offset = len(made) // 2
    ids = request.prompt_ids + tuple(made[:offset])
    return dataclasses.replace(request, prompt_ids=ids, offset=offset)


def test_a_replay_depends_on_no_more_than_the_replica_says(
    replica: Replica,
    requests: list[GenerationRequest],
    answer: Callable[..., Answers],
    record_property: Callable[[str, object], None],
) -> None:
    first = {name: ids for each in requests for name, ids in answer([each]).items()}
    assert answer(requests[:1])[0] == first[0]
    later = answer([moved(each, first[each.request_id]) for each in requests])
    replays = {
        "in a batch": answer(requests),
        "with drafts": answer(requests, draft_tokens=8),
        "preempted": answer(requests, blocks=SIXTEEN_BLOCKS),
        "moved": {name: first[name][: LENGTH // 2] + ids for name, ids in later.items()},
    }
    differ = {
        how: sum(answers[name] != first[name] for name in first) for how, answers in replays.items()
    }
    counts = ", ".join(f"{count} {how}" for how, count in differ.items())
    precision = f"{replica.info.dtype} {replica.info.quantization}"
    record_property("measured", f"{precision}: of {len(first)} answers differ {counts}")
    if replica.info.determinism is Determinism.BATCH_INVARIANT:
        assert not any(differ.values())
