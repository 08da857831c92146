"""A step under way while the next one is launched: nothing that a caller sees depends on it."""

import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.engine import Engine
from model_service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
)
from model_service.engine.thread import EngineThread

PROMPT = (1, 40, 50, 60)
GREEDY = SamplingParams(temperature=0.0)


def varied(seed: int) -> GenerationRequest:
    """A request of settings that go round with its seed."""
    sampling = SamplingParams(
        temperature=(0.0, 0.7, 1.5)[seed % 3],
        top_p=(0.95, 1.0)[seed % 2],
        top_k=(None, 40)[seed // 2 % 2],
        min_p=(0.0, 0.02)[seed // 4 % 2],
        min_gen_len=(0, 0, 12)[seed % 3],
        seed=seed,
        repetition_penalty=(1.0, 1.2)[seed // 3 % 2],
        presence_penalty=(0.0, 0.5)[seed // 5 % 2],
        frequency_penalty=(0.0, 0.3)[seed // 7 % 2],
        logit_bias={seed: 3.0} if seed % 6 == 1 else {},
    )
    prompt = tuple(7 + i % 5 for i in range(10 + seed % 23))
    return GenerationRequest(
        seed,
        prompt,
        30,
        sampling,
        stop_ids=frozenset([2, *range(40, 80)]),
        offset=seed % 9,
        logprobs=seed % 2 == 0,
        prompt_logprobs=seed % 8 == 0,
        top_logprobs=seed % 5,
        logprob_token_ids=tuple(range(seed % 4)),
    )


def test_lookahead_changes_no_answer(make_engine: Any, run: Any) -> None:
    requests = [varied(seed) for seed in range(60)]
    plain = run(make_engine(draft_tokens=0), requests)
    engine = make_engine(lookahead=True)
    ahead = run(engine, requests)
    assert {i: answer.ids for i, answer in ahead.items()} == {
        i: answer.ids for i, answer in plain.items()
    }
    for i, answer in ahead.items():
        assert answer.logprobs == pytest.approx(plain[i].logprobs, abs=1e-4)
        assert answer.finish_reason is plain[i].finish_reason
    assert {answer.finish_reason for answer in ahead.values()} == {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
    assert engine.load().free_blocks == engine.load().total_blocks


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(make_engine: Any) -> None:
    engine: Engine = make_engine(lookahead=True)
    engine.add(GenerationRequest("a", PROMPT, 3, GREEDY))
    made = []
    while engine.has_work:
        made.append((sum(len(output.ids) for output in engine.step()), engine.load().steps))
    assert made == [(0, 1), (1, 2), (1, 3), (1, 3)]


def test_a_stop_is_seen_one_step_late_and_the_surplus_token_dropped(
    make_engine: Any, run: Any
) -> None:
    plain = run(make_engine(draft_tokens=0), [GenerationRequest("a", PROMPT, 20, GREEDY)])["a"].ids
    stop = next(token for i, token in enumerate(plain) if i > 2 and token not in plain[:i])
    engine = make_engine(lookahead=True)
    request = GenerationRequest("a", PROMPT, 20, GREEDY, stop_ids=frozenset([stop]))
    answer = run(engine, [request])["a"]
    assert answer.ids == plain[: plain.index(stop)]
    assert answer.finish_reason is FinishReason.STOP
    load = engine.load()
    assert load.steps == len(answer.ids) + 2
    assert load.completion_tokens == len(answer.ids)
    assert load.free_blocks == load.total_blocks


def test_cancelling_frees_the_blocks_though_a_step_is_under_way(make_engine: Any, run: Any) -> None:
    engine: Engine = make_engine(lookahead=True)
    for i in range(3):
        engine.add(GenerationRequest(i, (*PROMPT, 70 + i), 20, GREEDY))
    for _ in range(4):
        engine.step()
    for i in range(3):
        engine.cancel(i)
    assert engine.load().free_blocks == engine.load().total_blocks
    assert [output.finish_reason for output in engine.step()] == [FinishReason.CANCELLED] * 3
    assert not engine.has_work


def test_an_id_is_free_again_while_the_cancelled_one_is_under_way(
    make_engine: Any, run: Any
) -> None:
    engine: Engine = make_engine(lookahead=True)
    engine.add(GenerationRequest("a", PROMPT, 20, GREEDY))
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    expected = run(make_engine(), [GenerationRequest("a", (1, 9), 5, GREEDY)])["a"].ids
    engine.add(GenerationRequest("a", (1, 9), 5, GREEDY))
    outputs = [output for _ in range(8) for output in engine.step()]
    assert outputs[0].finish_reason is FinishReason.CANCELLED
    assert [token for output in outputs[1:] for token in output.ids] == expected


@settings(max_examples=8)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True),
    cancels=st.dictionaries(st.integers(0, 25), st.integers(0, 99), max_size=6),
    spare_tokens=st.integers(0, 100),
    max_step_tokens=st.integers(1, 64),
)
def test_cancels_and_short_memory_leave_others_and_the_pool_whole(
    make_engine: Any,
    run: Any,
    seeds: list[int],
    cancels: dict[int, int],
    spare_tokens: int,
    max_step_tokens: int,
) -> None:
    sizes = {"kv_cache_tokens": 64 + spare_tokens, "max_seq_len": 64, "block_size": 4}
    engine: Engine = make_engine(lookahead=True, max_step_tokens=max_step_tokens, **sizes)
    made: dict[Any, list[int]] = {seed: [] for seed in seeds}
    for seed in seeds:
        engine.add(varied(seed))
    step = 0
    while engine.has_work:
        engine.cancel(cancels.get(step))
        step += 1
        for output in engine.step():
            made[output.request_id] += output.ids
    alone = run(make_engine(), [varied(seed) for seed in seeds])
    for seed in seeds:
        cancelled = seed in cancels.values()
        assert made[seed] == alone[seed].ids[: len(made[seed]) if cancelled else None]
    assert engine.load().free_blocks == engine.load().total_blocks
    assert engine.load().outstanding_tokens == 0


def test_the_last_token_arrives_though_no_other_request_comes(make_engine: Any) -> None:
    outputs: queue.SimpleQueue[list[SequenceOutput]] = queue.SimpleQueue()
    errors: list[Exception] = []
    thread = EngineThread(make_engine(lookahead=True), outputs.put, errors.append)
    thread.run()
    made: list[int] = []
    for request_id in range(2):
        thread.start(GenerationRequest(request_id, PROMPT, 5, GREEDY))
        finished = False
        while not finished:
            for output in outputs.get(timeout=60):
                made += output.ids
                finished = output.finish_reason is FinishReason.LENGTH
    thread.stop()
    assert not errors
    assert len(made) == 10
    assert made[:5] == made[5:]


def test_shards_take_drawn_tokens_from_the_leader(golden: Path) -> None:
    script = str(Path(__file__).with_name("lookahead_ranks.py"))
    launcher = [sys.executable, "-m", "model_service.launcher", "--shards=2"]
    command = [*launcher, script, str(golden / "checkpoints" / "gqa-mp1")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    ahead, plain = json.loads(made)
    assert len(ahead) == 12
    assert ahead == plain
