import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_service.engine.engine import Engine
from model_service.engine.sequence import FinishReason, GenerationRequest, SamplingParams

Case = dict[str, Any]
EOS = 2
Cases = Callable[[str], list[Case]]


def differences(answers: dict[Any, Any], cases: list[Case]) -> list[str]:
    """Ids of the cases whose tokens or logprobs are not those of Meta's code."""
    return [
        case["id"]
        for case in cases
        if answers[case["id"]].ids != case["ids"]
        or answers[case["id"]].logprobs != pytest.approx(case["logprobs"], abs=1e-4)
    ]


@pytest.mark.kernels
@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("mha-mp1", "mha"),
        ("mha-mp2", "mha"),
        ("mha-mp1-bf16", "mha-bf16"),
        ("gqa-mp1", "gqa"),
        ("gqa-mp2", "gqa"),
        ("gqa-mp4", "gqa"),
    ],
)
def test_golden_cases_in_one_batch(
    checkpoint: str,
    name: str,
    lookahead: bool,
    make_engine: Any,
    cases: Cases,
    request_for: Any,
    run: Any,
) -> None:
    engine = make_engine(checkpoint, max_batch_size=40, lookahead=lookahead)
    answers = run(engine, [request_for(case) for case in cases(name)])
    assert differences(answers, cases(name)) == []


@settings(max_examples=12)
@given(
    lookahead=st.booleans(),
    max_batch_size=st.integers(1, 12),
    max_step_tokens=st.integers(1, 64),
    block_size=st.integers(1, 40),
    spare_tokens=st.integers(0, 300),
    first=st.integers(0, 30),
    prefix_cache=st.booleans(),
    draft_tokens=st.integers(0, 8),
    warm=st.booleans(),
)
def test_no_engine_setting_changes_an_answer(
    make_engine: Any,
    cases: Cases,
    request_for: Any,
    run: Any,
    lookahead: bool,
    max_batch_size: int,
    max_step_tokens: int,
    block_size: int,
    spare_tokens: int,
    first: int,
    prefix_cache: bool,
    draft_tokens: int,
    warm: bool,
) -> None:
    engine = make_engine(
        lookahead=lookahead,
        prefix_cache=prefix_cache,
        draft_tokens=draft_tokens,
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        block_size=block_size,
        kv_cache_tokens=256 + spare_tokens,
    )
    chosen = cases("gqa")[first : first + 5]
    for _ in range(1 + warm):
        assert differences(run(engine, [request_for(case) for case in chosen]), chosen) == []
    load = engine.load()
    assert load.running_sequences == load.waiting_sequences == 0
    assert load.free_blocks == load.total_blocks
    assert load.outstanding_tokens == 0
    assert prefix_cache or not load.cached_blocks


@pytest.mark.parametrize("step_tokens", [1, 51, 85, 255])
def test_a_prompt_that_fills_the_context_gets_no_drafts(
    step_tokens: int, make_engine: Any, cases: Cases, request_for: Any, run: Any
) -> None:
    """Its last step has one token, like that of an answer; the text repeats, so it has drafts."""
    engine = make_engine(max_step_tokens=step_tokens, draft_tokens=8)
    prompt = (1, *range(60, 64)) * 52
    request = request_for(
        cases("gqa")[0], request_id="full", prompt_ids=prompt[:256], prompt_logprobs=True
    )
    answer = run(engine, [request])["full"]
    assert len(answer.logprobs) == 256
    assert answer.finish_reason is FinishReason.CONTEXT_LENGTH


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_pool_too_small_for_the_load_preempts_and_loses_nothing(
    lookahead: bool, make_engine: Any, cases: Cases, request_for: Any, run: Any
) -> None:
    engine = make_engine(kv_cache_tokens=256, max_batch_size=16, lookahead=lookahead)
    answers = run(engine, [request_for(case) for case in cases("gqa")])
    assert differences(answers, cases("gqa")) == []
    assert engine.load().preemptions > 0


def test_a_long_prompt_does_not_stall_a_running_sequence(
    make_engine: Any, request_for: Any, cases: Cases
) -> None:
    engine = make_engine(max_step_tokens=8)
    engine.add(request_for(cases("gqa")[0], request_id="running"))
    while not any(output.ids for output in engine.step()):
        pass
    engine.add(request_for(cases("gqa")[0], request_id="long", prompt_ids=(1,) * 200))
    for _ in range(20):
        advanced = {output.request_id for output in engine.step()}
        assert "running" in advanced
        assert "long" not in advanced


def test_cancelling_frees_the_blocks_before_the_next_step(
    make_engine: Any, request_for: Any, cases: Cases
) -> None:
    engine = make_engine()
    for case in cases("gqa")[:4]:
        engine.add(request_for(case))
    engine.step()
    assert engine.load().free_blocks < engine.load().total_blocks
    for case in cases("gqa")[:4]:
        engine.cancel(case["id"])
    assert engine.load().free_blocks == engine.load().total_blocks
    assert {output.finish_reason for output in engine.step()} == {FinishReason.CANCELLED}
    assert not engine.has_work


def test_a_waiting_sequence_can_be_cancelled(
    make_engine: Any, request_for: Any, cases: Cases, run: Any
) -> None:
    engine = make_engine(max_batch_size=1)
    first, second, third = cases("gqa")[:3]
    for case in (first, second):
        engine.add(request_for(case))
    engine.cancel(second["id"])
    cancelled = [output for output in engine.step() if output.finish_reason is not None]
    assert [output.request_id for output in cancelled] == [second["id"]]
    engine.cancel(first["id"])
    engine.step()
    assert differences(run(engine, [request_for(third)]), [third]) == []


def seeded(request_id: object, seed: int, **changes: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.8, seed=seed)
    return GenerationRequest(request_id, (1, 40, 50, 60, seed % 500), 40, sampling, **changes)


def test_a_seed_gives_the_same_tokens_alone_and_beside_others(make_engine: Any, run: Any) -> None:
    alone = run(make_engine(), [seeded("it", 42)])["it"].ids
    crowd = [seeded(i, i) for i in range(15)]
    beside = run(make_engine(max_batch_size=16), [*crowd[:7], seeded("it", 42), *crowd[7:]])
    assert beside["it"].ids == alone
    assert len({tuple(answer.ids) for answer in beside.values()}) > 10


def test_a_generation_goes_on_elsewhere_as_if_it_had_never_moved(
    make_engine: Any, run: Any
) -> None:
    whole = run(make_engine(), [seeded("it", 42, logprobs=True)])["it"]
    start = seeded("it", 42, logprobs=True)
    moved = GenerationRequest(
        "it", start.prompt_ids + tuple(whole.ids[:17]), 40, start.sampling, offset=17, logprobs=True
    )
    rest = run(make_engine(), [moved])["it"]
    assert rest.ids == whole.ids[17:]
    assert rest.logprobs == pytest.approx(whole.logprobs[17:], abs=1e-4)
    assert rest.finish_reason is whole.finish_reason is FinishReason.LENGTH


def test_a_prompt_that_fills_the_context_gets_an_empty_answer(
    make_engine: Any, run: Any, request_for: Any, cases: Cases
) -> None:
    engine = make_engine(max_seq_len=16)
    prompt = tuple(cases("gqa")[0]["prompt_ids"][:16])
    full = request_for(cases("gqa")[0], prompt_ids=prompt)
    scored = request_for(
        cases("gqa")[0], request_id="scored", prompt_ids=prompt, prompt_logprobs=True
    )
    answers = run(engine, [full, scored])
    assert answers[full.request_id].ids == []
    assert answers["scored"].ids == list(prompt)
    assert len(answers["scored"].logprobs) == 16
    assert answers["scored"].logprobs[0] == 0.0
    assert {answer.finish_reason for answer in answers.values()} == {FinishReason.CONTEXT_LENGTH}


@pytest.mark.parametrize(
    "settings", [{"draft_tokens": 0}, {"draft_tokens": 8}, {"lookahead": True}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_ends_an_answer_before_its_least_length(
    make_engine: Any, run: Any, settings: dict[str, Any], temperature: float
) -> None:
    prompt = (1, *range(60, 70)) * 3  # repeats, so that drafts are made
    stops = frozenset(range(2, 260))  # nearly half of the vocabulary
    sampling = SamplingParams(temperature=temperature, top_p=1, seed=5, min_gen_len=20)
    start = GenerationRequest("a", prompt, 40, sampling, stops)
    whole = run(make_engine(**settings), [start])["a"]
    assert len(whole.ids) >= 20
    assert whole.finish_reason is FinishReason.STOP  # soon after
    assert not stops.intersection(whole.ids)
    moved = dataclasses.replace(start, prompt_ids=prompt + tuple(whole.ids[:7]), offset=7)
    rest = run(make_engine(**settings), [moved])["a"]
    assert (rest.ids, rest.stop_token_id) == (whole.ids[7:], whole.stop_token_id)
    assert whole.stop_token_id in stops


def test_end_of_sequence_inside_a_prompt_stops_nothing(
    make_engine: Any, run: Any, request_for: Any, cases: Cases
) -> None:
    prompt = (*cases("gqa")[0]["prompt_ids"], 2, 1, 100)
    answer = run(make_engine(), [request_for(cases("gqa")[0], prompt_ids=prompt)])
    assert len(answer["one_turn"].ids) > 0


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_end_of_earlier_turns_does_not_make_an_answer_longer(
    lookahead: bool, make_engine: Any, run: Any
) -> None:
    engine = make_engine(lookahead=lookahead)

    def bias_that_ends_it(stop_ids: frozenset[int]) -> int:
        """The least bias of the end of sequence, which stands in the prompt, that draws it."""
        requests = [
            GenerationRequest(
                bias,
                (1, 40, EOS, 1, 50),
                1,
                SamplingParams(0.0, repetition_penalty=2.0, logit_bias={EOS: bias}),
                stop_ids,
            )
            for bias in range(100)
        ]
        answers = run(engine, requests)
        return int(min(bias for bias, answer in answers.items() if answer.ids in ([], [EOS])))

    assert 0 < bias_that_ends_it(frozenset([EOS])) < bias_that_ends_it(frozenset())


def test_top_logprobs_name_the_chosen_token_of_a_greedy_answer(
    make_engine: Any, request_for: Any, cases: Cases
) -> None:
    engine: Engine = make_engine()
    engine.add(request_for(cases("gqa")[0], top_logprobs=3))
    (output,) = engine.step()
    (entry,) = output.logprobs
    assert len(entry.top) == 3
    assert entry.top[0] == (output.ids[0], entry.logprob)


def test_a_higher_priority_goes_first(make_engine: Any, request_for: Any, cases: Cases) -> None:
    engine = make_engine(max_batch_size=1)
    engine.add(request_for(cases("gqa")[0], request_id="low", max_gen_len=1))
    engine.add(request_for(cases("gqa")[1], request_id="high", max_gen_len=1, priority=1))
    assert [engine.step()[0].request_id for _ in range(2)] == ["high", "low"]


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_sequence_with_logits_that_are_not_finite_fails_alone(
    lookahead: bool,
    spoil: Any,
    make_engine: Any,
    cases: Cases,
    request_for: Any,
    run: Any,
) -> None:
    healthy = [case for case in cases("gqa")[:6] if 7 not in case["prompt_ids"] + case["ids"]]
    assert len(healthy) > 2
    broken = request_for(healthy[0], request_id="broken", prompt_ids=(1, 7, 9))
    requests = [broken, *(request_for(case) for case in healthy)]
    engine = make_engine(lookahead=lookahead)
    spoil(engine, 7)
    answers = run(engine, requests)
    assert answers["broken"].finish_reason is FinishReason.FAILED
    assert "not finite for the token at position 3" in answers["broken"].error
    assert differences(answers, healthy) == []


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompt_ids": ()}, "prompt_ids: must not be empty"),
        ({"prompt_ids": (1,) * 257}, "the prompt has 257 tokens, the context length is 256"),
        ({"prompt_ids": (1, 560)}, r"prompt_ids\[1\]: must be less than the vocabulary size, 560"),
        ({"offset": 23}, "offset must leave at least one token"),
    ],
)
def test_a_request_that_breaks_a_limit_is_refused(
    make_engine: Any, request_for: Any, cases: Cases, changes: dict[str, Any], rule: str
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=rule):
        engine.add(request_for(cases("gqa")[0], **changes))
    assert not engine.has_work


def test_compute_time_is_split_over_the_sequences_of_a_step(
    make_engine: Any, request_for: Any, cases: Cases
) -> None:
    engine = make_engine(prefix_cache=False)
    engine.add(request_for(cases("gqa")[0], request_id="short", max_gen_len=1))
    engine.add(request_for(cases("gqa")[0], request_id="other", max_gen_len=1))
    short, other = (output.timings for output in engine.step())
    assert short.compute == pytest.approx(other.compute)
    assert 0 < short.compute < short.prefill
