"""Tokens that the engine does not compute again, counted on a real checkpoint."""

from dataclasses import replace
from typing import Any

import pytest

from model_service.engine.engine import Engine
from model_service.engine.sequence import FinishReason, GenerationRequest, SamplingParams

BLOCK = 8
GREEDY = SamplingParams(temperature=0.0)


def text(length: int, start: int) -> tuple[int, ...]:
    """Token ids that begin unlike those of another start."""
    return tuple(3 + (start * 37 + i * 7) % 550 for i in range(length))


def ask(request_id: object, prompt: tuple[int, ...], answer: int = 4, **changes: Any) -> Any:
    return GenerationRequest(request_id, prompt, answer, **({"sampling": GREEDY} | changes))


def start_together(engine: Engine, *requests: GenerationRequest) -> None:
    for request in requests:
        engine.add(request)


@pytest.fixture(params=[False, True], ids=["plain", "lookahead"])
def engine(make_engine: Any, request: pytest.FixtureRequest) -> Engine:
    made: Engine = make_engine(block_size=BLOCK, max_batch_size=16, lookahead=request.param)
    return made


def test_later_turns_of_a_dialog_compute_only_what_is_new(engine: Engine, run: Any) -> None:
    dialog: tuple[int, ...] = (1,)
    for turn in range(10):
        known, before = len(dialog), engine.load().prompt_tokens
        dialog += text(12, turn)
        dialog += tuple(run(engine, [ask(turn, dialog, answer=8)])[turn].ids)
        computed = engine.load().prompt_tokens - before
        # The last token of an answer was never computed.
        assert computed == len(dialog) - 8 - known + 1
    load = engine.load()
    assert load.cached_prompt_tokens > 3 * load.prompt_tokens
    assert load.free_blocks == load.total_blocks


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(
    ("block_size", "shared", "own", "max_step_tokens"),
    [
        (8, 200, 20, 512),
        (16, 200, 20, 512),  # they part within a block
        (16, 200, 5, 512),  # within the last, which is not full
        (16, 207, 20, 67),  # where the first one's chunk leaves off in that block, too
        (16, 207, 3, 50),
        (16, 1000, 20, 512),
    ],
)
def test_simultaneous_requests_compute_their_common_beginning_once(
    make_engine: Any,
    run: Any,
    block_size: int,
    shared: int,
    own: int,
    max_step_tokens: int,
    lookahead: bool,
) -> None:
    engine = make_engine(
        block_size=block_size,
        max_batch_size=64,
        max_seq_len=1100,
        kv_cache_tokens=64 * 256,
        max_step_tokens=max_step_tokens,
        lookahead=lookahead,
    )
    # As many tokens of their own as can differ in the first.
    prompts = [(*text(shared, 0), 3 + i, *text(own - 1, i)) for i in range(64)]
    together = run(engine, [ask(i, prompt) for i, prompt in enumerate(prompts)])
    assert engine.load().prompt_tokens == shared + 64 * own
    cold = make_engine(max_batch_size=1, max_seq_len=1100, prefix_cache=False)
    for i in (0, 1, 63):
        assert together[i].ids == run(cold, [ask(i, prompts[i])])[i].ids


def test_answers_to_one_prompt_compute_it_once(engine: Engine, run: Any) -> None:
    prompt = text(165, 0)
    sampling = [SamplingParams(temperature=1.0, seed=seed) for seed in range(8)]
    answers = run(engine, [ask(i, prompt, sampling=s) for i, s in enumerate(sampling)])
    assert engine.load().prompt_tokens == 165 + 7
    assert len({tuple(answer.ids) for answer in answers.values()}) > 1


def test_the_first_block_is_shared_whole_or_not_at_all(make_engine: Any) -> None:
    engine = make_engine(block_size=BLOCK)
    dialogs = [(*text(BLOCK - 1, 0), 3 + i, *text(30, i)) for i in range(2)]
    start_together(engine, *(ask(i, dialog) for i, dialog in enumerate(dialogs)))
    engine.step()
    assert engine.load().running_sequences == 2  # neither waits for the other
    while engine.has_work:
        engine.step()
    assert engine.load().cached_prompt_tokens == 0


def test_scopes_share_nothing(engine: Engine, run: Any) -> None:
    prompt = text(60, 0)
    run(engine, [ask("before", prompt, cache_scope="ada")])
    together = [ask(scope, prompt, cache_scope=scope) for scope in ("", "ben")]
    start_together(engine, *together, ask("same", prompt, cache_scope="ada"))
    engine.step()
    assert engine.load().running_sequences == 3  # none waits for another
    while engine.has_work:
        engine.step()
    assert engine.load().cached_prompt_tokens == 59


def test_a_sequence_that_waits_for_blocks_lets_others_pass(make_engine: Any) -> None:
    engine = make_engine(block_size=BLOCK, max_step_tokens=64)
    start_together(engine, ask("first", text(90, 0)), ask("same", text(90, 0)))
    engine.add(ask("other", text(8, 5)))
    counts: list[tuple[int, int]] = []
    while not counts or counts[-1] != (3, 0):
        engine.step()
        counts.append((engine.load().running_sequences, engine.load().waiting_sequences))
    assert [*dict.fromkeys(counts)] == [(1, 2), (2, 1), (3, 0)]
    assert engine.load().prompt_tokens == 90 + 8 + 1


@pytest.mark.parametrize("cancelled", ["first", "second"])
def test_who_waits_for_a_sequence_goes_on_when_it_is_cancelled(
    make_engine: Any, run: Any, cancelled: str
) -> None:
    engine = make_engine(block_size=BLOCK, max_step_tokens=32)
    start_together(engine, *(ask(name, text(90, 0)) for name in ("first", "second", "third")))
    engine.step()
    assert (engine.load().running_sequences, engine.load().waiting_sequences) == (1, 2)
    engine.cancel(cancelled)
    ended = {output.request_id: output for _ in range(20) for output in engine.step()}
    assert ended[cancelled].finish_reason is FinishReason.CANCELLED
    assert {output.finish_reason for name, output in ended.items() if name != cancelled} == {
        FinishReason.LENGTH
    }
    assert engine.load().prompt_tokens <= 90 + 2 * BLOCK
    assert engine.load().free_blocks == engine.load().total_blocks


def test_a_cached_prompt_still_gets_all_its_logprobs(
    engine: Engine, run: Any, cases: Any, request_for: Any
) -> None:
    scored = [case for case in cases("gqa") if case["args"].get("echo")]
    for _ in range(2):
        answers = run(engine, [request_for(case) for case in scored])
        for case in scored:
            assert answers[case["id"]].ids == case["ids"]
            assert answers[case["id"]].logprobs == pytest.approx(case["logprobs"], abs=1e-4)


@pytest.mark.parametrize("max_step_tokens", [7, 512])
@pytest.mark.parametrize("lookahead", [False, True])
def test_candidates_behind_one_prompt_compute_it_once_and_score_as_alone(
    make_engine: Any, run: Any, lookahead: bool, max_step_tokens: int
) -> None:
    engine = make_engine(
        block_size=BLOCK, max_batch_size=16, max_step_tokens=max_step_tokens, lookahead=lookahead
    )
    prompt, candidates = text(101, 0), [(3 + i, *text(i, i)) for i in range(12)]
    asked = [ask(i, (*prompt, *each), 0, prompt_logprobs=True) for i, each in enumerate(candidates)]
    scored = run(engine, [replace(each, scored_from=len(prompt)) for each in asked])
    # All but the first compute the prompt's last token again, whose logits score their own first.
    assert engine.load().prompt_tokens == len(prompt) + sum(map(len, candidates)) + 11
    alone = make_engine(max_batch_size=1, prefix_cache=False)
    for i, request in enumerate(asked):
        assert scored[i].ids == list(candidates[i])
        whole = run(alone, [request])[i].logprobs
        assert scored[i].logprobs == pytest.approx(whole[len(prompt) :], abs=1e-4)


@pytest.mark.parametrize("lookahead", [False, True])
def test_preempted_sequence_still_scores_the_end_of_its_prompt(
    make_engine: Any, run: Any, lookahead: bool
) -> None:
    prompts = [text(60, i) for i in range(8)]
    asked = [
        ask(i, each, 90, prompt_logprobs=True, logprobs=True) for i, each in enumerate(prompts)
    ]
    whole = run(make_engine(max_batch_size=1), asked)
    small = make_engine(
        kv_cache_tokens=256, max_batch_size=16, max_step_tokens=16, lookahead=lookahead
    )
    scored = run(small, [replace(each, scored_from=20 + i) for i, each in enumerate(asked)])
    assert small.load().preemptions > 0
    for i in range(8):
        assert scored[i].ids == whole[i].ids[20 + i :]
        assert scored[i].logprobs == pytest.approx(whole[i].logprobs[20 + i :], abs=1e-4)


def test_nothing_to_score_needs_no_step(engine: Engine, run: Any) -> None:
    request = ask("all", text(9, 0), 0, prompt_logprobs=True, scored_from=9)
    assert run(engine, [request])["all"].ids == []
    assert engine.load().steps == 0
    with pytest.raises(ValueError, match="scored_from must be 0 to 9, the number of prompt_ids"):
        engine.add(replace(request, scored_from=10))


def test_the_first_and_the_last_output_say_what_was_cached(engine: Engine, run: Any) -> None:
    run(engine, [ask("before", text(40, 0))])
    start_together(engine, ask("again", text(40, 0)), ask("moved", text(40, 0), 30, offset=20))
    outputs = [output for _ in range(15) for output in engine.step()]
    last = {o.request_id: o.cached_prompt_tokens for o in outputs if o.finish_reason}
    first = {o.request_id: o.cached_prompt_tokens for o in reversed(outputs) if o.ids}
    assert first == last == {"again": 39, "moved": 20}


def test_without_the_cache_all_is_computed(make_engine: Any, run: Any) -> None:
    engine = make_engine(block_size=BLOCK, prefix_cache=False)
    run(engine, [ask(i, text(40, 0)) for i in range(3)])
    load = engine.load()
    assert (load.prompt_tokens, load.cached_prompt_tokens, load.cached_blocks) == (120, 0, 0)


def test_a_preempted_sequence_finds_its_blocks_again(make_engine: Any, run: Any) -> None:
    engine = make_engine(block_size=BLOCK, kv_cache_tokens=256, max_batch_size=16)
    requests = [ask(i, text(20, i), answer=60) for i in range(8)]
    crowded = run(engine, requests)
    load = engine.load()
    assert load.preemptions > 0
    assert load.cached_prompt_tokens > 0
    roomy = run(make_engine(prefix_cache=False), requests)
    assert {i: a.ids for i, a in crowded.items()} == {i: a.ids for i, a in roomy.items()}


def test_a_step_that_came_too_late_leaves_nothing_in_the_cache(
    engine: Engine, make_engine: Any, run: Any
) -> None:
    prompt = text(12, 0)
    ids = run(make_engine(), [ask("whole", prompt, answer=12)])["whole"].ids
    assert ids[4] not in ids[:4]
    run(engine, [ask("stopped", prompt, answer=12, stop_ids=frozenset({ids[4]}))])
    # With lookahead the token that ends it is put into a third block before it is read.
    assert engine.load().cached_blocks == (12 + 4) // BLOCK


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_failed_sequence_leaves_nothing_in_the_cache(
    lookahead: bool, spoil: Any, make_engine: Any, run: Any
) -> None:
    sizes = {"block_size": BLOCK, "max_step_tokens": 18}
    engine = make_engine(lookahead=lookahead, **sizes)
    spoil(engine, 2)
    prompt = text(60, 0)
    broken = (*prompt[:30], 2, *prompt[31:])
    assert run(engine, [ask("broken", broken)])["broken"].finish_reason is FinishReason.FAILED
    load = engine.load()
    assert (load.cached_blocks, load.free_blocks) == (0, load.total_blocks)
    assert run(engine, [ask("sound", prompt)])["sound"].finish_reason is FinishReason.LENGTH
    assert engine.load().cached_prompt_tokens == 0


def test_cancelling_in_the_middle_frees_and_forgets_nobody(engine: Engine) -> None:
    start_together(engine, *(ask(i, text(100, i % 3), answer=50) for i in range(9)))
    for _ in range(5):
        engine.step()
    assert engine.load().free_blocks < engine.load().total_blocks
    for i in range(9):
        engine.cancel(i)
    load = engine.load()
    assert (load.running_sequences, load.waiting_sequences, load.outstanding_tokens) == (0, 0, 0)
    assert load.free_blocks == load.total_blocks
    assert load.cached_blocks > 0
