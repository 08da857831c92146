"""A draft model beside the target: answers stay the same to the token, whatever it drafts."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from model_service.engine.drafting.model_drafter import ModelDrafter
from model_service.engine.engine import Engine
from model_service.engine.scheduling.speculation.costs import DraftCosts
from model_service.engine.scheduling.speculation.drafters import Source
from model_service.engine.sequence import GenerationRequest, SamplingParams
from model_service.loading.load_replica import load_replica
from model_service.loading.options import ReplicaOptions
from model_service.model.cpu.kernels import without_kernels
from serving.errors import StartError
from tests.model_service.draft_ranks import cheap

LENGTH = 16
TARGET, SMALLER = "gqa-mp1", "mha-mp1"
MakeEngine = Callable[..., Engine]
MODES = (
    SamplingParams(0.0),
    SamplingParams(0.0, repetition_penalty=1.3, min_gen_len=5),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.0, top_p=1.0),
    SamplingParams(1.0, top_k=20, min_p=0.02),
    SamplingParams(0.9, presence_penalty=0.5, frequency_penalty=0.3, logit_bias={60: 2.0}),
    SamplingParams(2.0, top_p=0.95),
)


@pytest.fixture
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost next to nothing, so that they are made however busy the machine is."""
    monkeypatch.setattr(DraftCosts, "of", cheap)


@pytest.fixture
def with_draft(make_engine: MakeEngine, golden: Path) -> MakeEngine:
    def make(draft: str, **changes: Any) -> Engine:
        return make_engine(TARGET, draft_ckpt_dir=golden / "checkpoints" / draft, **changes)

    return make


def requests(count: int) -> list[GenerationRequest]:
    """Requests of every sampling mode; every third prompt repeats itself, so that n-grams draft."""
    return [
        GenerationRequest(
            seed,
            tuple(7 + (seed + i) % (5 if seed % 3 == 0 else 90) for i in range(3 + seed % 40)),
            LENGTH,
            dataclasses.replace(MODES[seed % len(MODES)], seed=seed),
            stop_ids=frozenset([2, 50]),
        )
        for seed in range(count)
    ]


def drafter_of(engine: Engine) -> ModelDrafter:
    assert engine._speculation._model is not None
    return cast(ModelDrafter, engine._speculation._model.model)


def tokens_of(run: Any, engine: Engine, asked: list[GenerationRequest]) -> dict[Any, list[int]]:
    return {seed: answer.ids for seed, answer in run(engine, asked).items()}


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize(
    ("draft", "dtype", "share"),
    # A draft model computes in bfloat16 if there are kernels for it: rounded like the target, the
    # target's own weights draft what it draws.
    [(TARGET, "float32" if without_kernels() else "bfloat16", 0.95), (SMALLER, "float32", 0.0)],
)
def test_two_hundred_answers_are_the_same_with_a_draft_model(
    make_engine: MakeEngine, with_draft: MakeEngine, run: Any, draft: str, dtype: str, share: float
) -> None:
    asked, changes = requests(200), {"max_batch_size": 25, "dtype": dtype}
    without = tokens_of(run, make_engine(TARGET, draft_tokens=0, **changes), asked)
    engine = with_draft(draft, **changes)
    assert tokens_of(run, engine, asked) == without
    count = engine.load().drafts[Source.MODEL]
    assert count.drafted > 0
    assert count.accepted >= share * count.drafted
    # All that the draft model held is free again.
    pool = drafter_of(engine)._cache.pool
    assert pool.free_count == pool.total


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache_tokens": 256, "max_batch_size": 16},  # so few that sequences give way
        {"max_step_tokens": 8, "block_size": 4},
        {"prefix_cache": False},
        {"max_batch_size": 1},
    ],
)
def test_no_setting_changes_an_answer_with_a_draft_model(
    make_engine: MakeEngine, with_draft: MakeEngine, run: Any, changes: dict[str, Any]
) -> None:
    asked = requests(16)
    without = tokens_of(run, make_engine(TARGET, draft_tokens=0), asked)
    engine = with_draft(TARGET, **changes)
    assert tokens_of(run, engine, asked) == without
    assert tokens_of(run, engine, asked) == without  # with what is cached by now
    assert bool(engine.load().preemptions) is ("kv_cache_tokens" in changes)
    assert engine.load().drafts[Source.MODEL].accepted > 0


@pytest.mark.usefixtures("cheap_drafts")
def test_an_answer_goes_on_elsewhere_with_a_draft_model(
    make_engine: MakeEngine, with_draft: MakeEngine, run: Any
) -> None:
    asked = requests(14)
    whole = tokens_of(run, make_engine(TARGET, draft_tokens=0), asked)
    moved = [
        dataclasses.replace(
            each, prompt_ids=each.prompt_ids + tuple(whole[each.request_id][:9]), offset=9
        )
        for each in asked
        if len(whole[each.request_id]) > 9
    ]
    rest = tokens_of(run, with_draft(SMALLER), moved)
    assert rest == {each.request_id: whole[each.request_id][9:] for each in moved}


@pytest.mark.usefixtures("cheap_drafts")
def test_a_later_turn_computes_only_what_is_new_in_the_draft_model(
    with_draft: MakeEngine, run: Any
) -> None:
    engine = with_draft(TARGET)
    first = GenerationRequest("first", tuple(range(5, 85)), LENGTH, SamplingParams(0.0))
    prompt = first.prompt_ids + tuple(run(engine, [first])["first"].ids)
    later = dataclasses.replace(first, request_id="later", prompt_ids=prompt)
    run(engine, [later])
    cache = drafter_of(engine)._cache
    # Both turns share what is full of the first one: 96 tokens in blocks of 16.
    assert cache.pool.cached_count < 2 * len(prompt) // 16


def test_a_draft_model_that_gives_no_numbers_changes_nothing(
    make_engine: MakeEngine, with_draft: MakeEngine, run: Any, cheap_drafts: None
) -> None:
    asked = requests(7)
    engine = with_draft(TARGET)
    drafter_of(engine)._runner._network.get_parameter("norm.weight").fill_(torch.nan)
    assert tokens_of(run, engine, asked) == tokens_of(
        run, make_engine(TARGET, draft_tokens=0), asked
    )
    assert engine.load().drafts[Source.MODEL].drafted == 0


CHECKPOINTS = Path(__file__).parents[1] / "golden" / "checkpoints"
DEMONSTRATION = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_ckpt_dir": Path("missing")}, "--draft_ckpt_dir: missing: not found"),
        ({"draft_tokens": 0}, "no effect with --draft_tokens 0"),
        ({"lookahead": "on"}, "no effect with --lookahead on"),
        ({"ckpt_dir": CHECKPOINTS / SMALLER}, "parameters, more than the"),
        ({"ckpt_dir": DEMONSTRATION}, "has a vocabulary of 560 tokens, and .* one of 1,920"),
    ],
)
def test_a_draft_model_that_cannot_draft_is_refused(changes: dict[str, Any], message: str) -> None:
    folder = CHECKPOINTS / TARGET
    options = ReplicaOptions(folder, 64, device="cpu", draft_ckpt_dir=folder)
    with pytest.raises(StartError, match=message):
        load_replica(dataclasses.replace(options, **changes))


def test_a_draft_model_counts_in_the_memory(
    golden: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder = golden / "checkpoints"
    options = ReplicaOptions(folder / TARGET, 64, device="cpu")
    drafted = dataclasses.replace(options, draft_ckpt_dir=folder / TARGET)
    monkeypatch.setattr("model_service.loading.memory.free_memory", lambda _device: 2**28 + 2**21)
    assert load_replica(drafted).limits.blocks < load_replica(options).limits.blocks
    with caplog.at_level("INFO"):
        load_replica(drafted)
    assert "draft model" in caplog.text


def test_the_leader_of_shards_drafts_alone(golden: Path) -> None:
    script = str(Path(__file__).with_name("draft_ranks.py"))
    launcher = [sys.executable, "-m", "model_service.launcher", "--shards=2"]
    command = [*launcher, script, str(golden / "checkpoints")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=100
    ).stdout
    plain, drafted, accepted = json.loads(made)
    assert len(plain) == 12
    assert drafted == plain
    assert accepted > 0
