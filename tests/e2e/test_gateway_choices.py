"""Several answers to one dialog and answers that end at given tokens, on a real model."""

from collections import defaultdict
from typing import Any

import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams, TokenIds

SEED = 2**64 - 2
QUESTIONS = ["What about the llama?", "What about the road and the bridge?"]
EOS = 2


def dialogs(*questions: str) -> list[Dialog]:
    return [Dialog(messages=[Message(role=ROLE_USER, content=question)]) for question in questions]


def sampled(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.2, "max_gen_len": 24, **fields})


def ids(prediction: Any) -> list[int]:
    return [token.id for token in prediction.tokens]


@pytest.mark.parametrize("seed", [{"seed": SEED}, {}], ids=["given", "drawn"])
async def test_each_answer_is_what_its_seed_gives_alone(chat: Any, seed: dict[str, int]) -> None:
    request = ChatCompleteRequest(
        dialogs=dialogs(*QUESTIONS), sampling=sampled(**seed), n=3, logprobs=True
    )
    predictions = (await chat.ChatComplete(request)).predictions
    for place, prediction in enumerate(predictions):
        again = ChatCompleteRequest(
            dialogs=dialogs(QUESTIONS[place // 3]),
            sampling=sampled(seed=prediction.seed),
            logprobs=True,
        )
        [alone] = (await chat.ChatComplete(again)).predictions
        assert ids(prediction) == ids(alone)
        assert prediction.text == alone.text
        assert prediction.seed == (predictions[place // 3 * 3].seed + place % 3) % 2**64
    assert [each.choice_index for each in predictions] == [0, 1, 2] * 2
    assert len({each.text for each in predictions}) > 3


async def test_stream_interleaves_its_answers_and_joins_to_the_unary_ones(chat: Any) -> None:
    fields: Any = {
        "dialogs": dialogs(*QUESTIONS),
        "sampling": sampled(seed=SEED, ignore_eos=True),
        "n": 3,
    }
    unary = (await chat.ChatComplete(ChatCompleteRequest(**fields))).predictions
    texts: defaultdict[tuple[int, int], str] = defaultdict(str)
    places = []
    async for response in chat.ChatCompleteStream(ChatCompleteStreamRequest(**fields)):
        event = response.event
        if event.HasField("delta"):
            places.append((event.delta.index, event.delta.choice_index))
            texts[places[-1]] += event.delta.text
    in_order = [(dialog, choice) for dialog in range(2) for choice in range(3)]
    assert [texts[place] for place in in_order] == [each.text for each in unary]
    assert places != sorted(places)


async def test_continuations_of_token_ids_count_from_the_seed(chat: Any) -> None:
    prompt_ids = [TokenIds(ids=[1, 400, 401]), TokenIds(ids=[1, 402])]
    request = TextCompleteRequest(prompt_ids=prompt_ids, sampling=sampled(seed=7), n=2, echo=True)
    predictions = (await chat.TextComplete(request)).predictions
    assert [(each.choice_index, each.seed) for each in predictions] == [(0, 7), (1, 8)] * 2
    second = TextCompleteRequest(prompt_ids=prompt_ids[1:], sampling=sampled(seed=8), echo=True)
    [alone] = (await chat.TextComplete(second)).predictions
    assert alone.text == predictions[3].text
    assert alone.usage.prompt_tokens == predictions[3].usage.prompt_tokens == 2


async def test_greedy_answers_are_all_the_same(chat: Any) -> None:
    greedy = sampled(temperature=0)
    request = ChatCompleteRequest(dialogs=dialogs(QUESTIONS[0]), sampling=greedy, n=16)
    predictions = (await chat.ChatComplete(request)).predictions
    assert len(predictions) == 16
    assert len({each.text for each in predictions}) == 1


async def test_answers_leave_no_block_behind_finished_or_cancelled(
    chat: Any, idle_load: Any
) -> None:
    request = ChatCompleteRequest(dialogs=dialogs(*QUESTIONS), sampling=sampled(), n=8)
    assert len((await chat.ChatComplete(request)).predictions) == 16
    endless = sampled(max_gen_len=200, ignore_eos=True)
    stream = chat.TextCompleteStream(
        TextCompleteStreamRequest(prompts=["one"], sampling=endless, n=16)
    )
    while not (await stream.read()).event.HasField("delta"):
        pass
    stream.cancel()
    load = await idle_load()
    assert load.free_blocks == load.total_blocks
    assert load.outstanding_tokens == 0


async def test_special_tags_are_refused_as_often_as_answers_are_wanted(chat: Any) -> None:
    request = ChatCompleteRequest(dialogs=dialogs("[INST]", "hi"), sampling=sampled(), n=2)
    predictions = (await chat.ChatComplete(request)).predictions
    refused = [each.text.startswith("Error: special tags") for each in predictions]
    assert refused == [True, True, False, False]


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_stop_token_ends_the_answer_where_it_would_come(chat: Any, ignore_eos: bool) -> None:
    request = TextCompleteRequest(
        prompts=["The llama is"], sampling=sampled(temperature=0), logprobs=True
    )
    [whole] = (await chat.TextComplete(request)).predictions
    stop = ids(whole)[7]
    request.sampling.MergeFrom(SamplingParams(ignore_eos=ignore_eos, stop_token_ids=[559, stop]))
    [ended] = (await chat.TextComplete(request)).predictions
    assert ids(ended) == ids(whole)[: ids(whole).index(stop)]
    assert ended.usage.completion_tokens == len(ended.tokens)
    assert ended.finish_reason == FINISH_REASON_STOP
    assert whole.text.startswith(ended.text)


async def test_stop_token_in_a_prompt_ends_nothing(chat: Any) -> None:
    request = TextCompleteRequest(
        prompt_ids=[TokenIds(ids=[1, 400, 401])],
        sampling=sampled(temperature=0, logit_bias={400: -100.0}, stop_token_ids=[400]),
        logprobs=True,
    )
    [prediction] = (await chat.TextComplete(request)).predictions
    assert prediction.usage.completion_tokens > 0
    assert 400 not in ids(prediction)


async def test_end_of_sequence_as_a_stop_token_holds_though_it_is_ignored(chat: Any) -> None:
    certain = sampled(ignore_eos=True, stop_token_ids=[EOS], logit_bias={EOS: 100.0})
    request = TextCompleteRequest(prompts=["The"], sampling=certain)
    [prediction] = (await chat.TextComplete(request)).predictions
    assert (prediction.text, prediction.finish_reason) == ("", FINISH_REASON_STOP)
