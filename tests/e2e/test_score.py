"""Scores of a real model: those of Meta's code, and of the model's own answers."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    ScoreRequest,
    TextCompleteRequest,
    TokenizeRequest,
)
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from tests.e2e.test_access_log import lines

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mha.json").read_text())["cases"]
ECHOED = [case for case in GOLDEN if case["args"].get("echo")]
GREEDY = SamplingParams(temperature=0, max_gen_len=24)
QUESTION = Dialog(messages=[Message(role=ROLE_USER, content="What do llamas eat all day long?")])
CANDIDATES = [" the road", " a bridge of ropes", " the llama and the road", " 240 km"]


@pytest.mark.parametrize("case", ECHOED, ids=[case["id"] for case in ECHOED])
async def test_logprobs_are_metas(chat: Any, case: dict[str, Any]) -> None:
    """A case's tokens may be parted anywhere into a prompt and a candidate."""
    ids, logprobs = case["ids"], case["logprobs"]
    for border in {1, len(ids) // 2, len(ids) - 1} - {0}:
        prompt, candidate = TokenIds(ids=ids[:border]), TokenIds(ids=ids[border:])
        request = ScoreRequest(prompt_ids=prompt, candidate_ids=[candidate])
        [score] = (await chat.Score(request)).scores
        assert [token.id for token in score.tokens] == ids[border:]
        expected = logprobs[border:]
        assert [token.logprob for token in score.tokens] == pytest.approx(expected, abs=1e-4)
        assert score.logprob == pytest.approx(math.fsum(expected), abs=1e-4 * len(expected))


async def test_greedy_answer_has_the_logprobs_that_it_was_generated_with(chat: Any) -> None:
    request = ChatCompleteRequest(
        dialogs=[QUESTION], sampling=GREEDY, logprobs=True, top_logprobs=2, logprob_token_ids=[7]
    )
    [answer] = (await chat.ChatComplete(request)).predictions
    ids = TokenIds(ids=[token.id for token in answer.tokens])
    other = TokenIds(ids=[*ids.ids[:-1], 7])
    scoring = ScoreRequest(
        dialog=QUESTION, candidate_ids=[ids, other], top_logprobs=2, logprob_token_ids=[7]
    )
    [same, changed] = (await chat.Score(scoring)).scores
    assert (same.is_greedy, changed.is_greedy) == (True, False)
    for mine, theirs in zip(same.tokens, answer.tokens, strict=True):
        assert (mine.id, mine.text, mine.bytes, mine.rank) == (
            *(theirs.id, theirs.text, theirs.bytes),
            theirs.rank,
        )
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        for name in ("top_logprobs", "requested_logprobs"):
            pairs = zip(getattr(mine, name), getattr(theirs, name), strict=True)
            assert all(a.id == b.id and abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)
    assert changed.tokens[-1].logprob == pytest.approx(
        answer.tokens[-1].requested_logprobs[0].logprob, abs=1e-4
    )


async def test_texts_have_the_logprobs_that_echo_tells(chat: Any) -> None:
    prompt = "The message went over"
    scored = (await chat.Score(ScoreRequest(prompt=prompt, candidates=CANDIDATES))).scores
    prompts = [prompt + candidate for candidate in CANDIDATES]
    none = SamplingParams(max_gen_len=0)
    request = TextCompleteRequest(prompts=prompts, sampling=none, echo=True, logprobs=True)
    for score, echo in zip(scored, (await chat.TextComplete(request)).predictions, strict=True):
        behind = echo.tokens[-len(score.tokens) :]
        assert [token.id for token in score.tokens] == [token.id for token in behind]
        assert score.logprob == pytest.approx(sum(t.logprob for t in behind), abs=1e-3)
        assert score.usage.prompt_tokens == len(echo.tokens)


async def test_answers_as_texts_have_the_tokens_of_the_dialogs_prompt(chat: Any) -> None:
    request = ScoreRequest(dialog=QUESTION, candidates=["Grass and leaves."])
    [score] = (await chat.Score(request)).scores
    rendered = await chat.RenderPrompt(RenderPromptRequest(dialog=QUESTION))
    text = f"{rendered.segments[0]} Grass and leaves."
    [whole] = (await chat.Tokenize(TokenizeRequest(texts=[text]))).tokenizations
    assert [*rendered.ids, *(token.id for token in score.tokens)] == [*whole.ids]


async def test_perplexity_of_a_text_is_that_of_its_tokens(chat: Any) -> None:
    text = "The llama walks over the bridge, and the road crosses the river."
    [whole] = (await chat.Score(ScoreRequest(prompt="", candidates=[text]))).scores
    [ids] = (await chat.Tokenize(TokenizeRequest(texts=[text]))).tokenizations
    request = ScoreRequest(
        prompt_ids=TokenIds(ids=ids.ids[:1]), candidate_ids=[TokenIds(ids=ids.ids[1:])]
    )
    [again] = (await chat.Score(request)).scores
    assert [token.id for token in whole.tokens] == [*ids.ids[1:]]
    assert whole.logprob == pytest.approx(again.logprob, abs=1e-3)
    first, second = ids.ids[:9], ids.ids[9:]
    parts = ScoreRequest(prompt_ids=TokenIds(ids=first), candidate_ids=[TokenIds(ids=second)])
    before = ScoreRequest(
        prompt_ids=TokenIds(ids=first[:1]), candidate_ids=[TokenIds(ids=first[1:])]
    )
    total = [(await chat.Score(each)).scores[0].logprob for each in (before, parts)]
    assert sum(total) == pytest.approx(whole.logprob, abs=1e-3)


async def test_prompt_is_computed_once_for_all_candidates(
    chat: Any, stack: Any, idle_load: Any
) -> None:
    prompt = [1, *(300 + i % 200 for i in range(180))]
    candidates = [TokenIds(ids=[10 + i, 20, 30, 40]) for i in range(30)]
    before = await idle_load()
    request = ScoreRequest(prompt_ids=TokenIds(ids=prompt), candidate_ids=candidates)
    response = await chat.Score(request, metadata=(("x-request-id", "once"),))
    after = await idle_load()
    # All but one candidate have the logits of the prompt's last token computed for them again.
    computed = len(prompt) + 30 * 4 + 29
    assert after.prompt_tokens - before.prompt_tokens == computed
    cached = [score.usage.cached_prompt_tokens for score in response.scores]
    assert sorted(cached) == [0] + [len(prompt) - 1] * 29
    assert after.free_blocks == after.total_blocks
    [line] = lines(stack.gateway, "once")
    assert (line["method"], line["answers"], line["completion_tokens"]) == ("Score", 30, 0)
    assert line["prompt_tokens"] - line["cached_prompt_tokens"] == computed


async def test_cancelled_call_leaves_no_block_behind(chat: Any, idle_load: Any) -> None:
    prompt = TokenIds(ids=[1, *(310 + i % 190 for i in range(200))])
    candidates = [TokenIds(ids=[10 + i] * 50) for i in range(64)]
    calls = [chat.Score(ScoreRequest(prompt_ids=prompt, candidate_ids=candidates)) for _ in "abc"]
    # They have begun when another call that came after them is answered.
    await chat.Score(ScoreRequest(prompt="a", candidates=["b"]))
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    load = await idle_load()
    assert load.free_blocks == load.total_blocks
    assert load.outstanding_tokens == 0
