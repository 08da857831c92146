"""The options of a request beyond a plain answer, on a real model."""

from typing import Any

import pytest

from llama.v1.chat_pb2 import (
    CONTEXT_POLICY_DROP_OLDEST_TURNS,
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    GetModelRequest,
    Message,
    RenderPromptRequest,
    TextCompleteRequest,
)
from llama.v1.sampling_pb2 import (
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP_STRING,
    SamplingParams,
    TokenIds,
)

GREEDY = SamplingParams(temperature=0, max_gen_len=24)
CONTEXT_LENGTH = 256
BOS = 1


async def continue_text(chat: Any, **fields: Any) -> Any:
    request = TextCompleteRequest(**{"sampling": GREEDY, **fields})
    [prediction] = (await chat.TextComplete(request)).predictions
    return prediction


@pytest.mark.parametrize("echo", [False, True])
async def test_ids_are_continued_as_their_text_is(chat: Any, echo: bool) -> None:
    by_text = await continue_text(chat, prompts=["The llama is"], logprobs=True, echo=True)
    ids = [token.id for token in by_text.tokens][: by_text.usage.prompt_tokens]
    by_ids = await continue_text(chat, prompt_ids=[TokenIds(ids=ids)], echo=echo)
    assert ids[0] == BOS
    assert by_ids.text == by_text.text.removeprefix("" if echo else "The llama is")
    assert not by_ids.tokens


async def test_stop_string_across_token_borders_ends_the_answer_before_it(chat: Any) -> None:
    whole = await continue_text(chat, prompts=["The llama is"])
    stop = whole.text[5:11]
    sampling = SamplingParams(temperature=0, max_gen_len=24, stop=["not there", stop])
    ended = await continue_text(chat, prompts=["The llama is"], sampling=sampling)
    assert ended.text == whole.text[: whole.text.index(stop)]
    assert ended.finish_reason == FINISH_REASON_STOP_STRING
    assert 0 < ended.usage.completion_tokens < whole.usage.completion_tokens
    assert ended.usage.decode_time.ToNanoseconds() > 0


async def test_greedy_token_is_the_first_of_its_alternatives(chat: Any) -> None:
    prediction = await continue_text(chat, prompts=["1 2"], logprobs=True, top_logprobs=3)
    for token in prediction.tokens:
        best, *others = token.top_logprobs
        assert (best.id, best.text, best.bytes) == (token.id, token.text, token.bytes)
        assert best.logprob == pytest.approx(token.logprob)
        assert best.logprob > others[0].logprob > others[1].logprob


@pytest.mark.parametrize("logprobs", [False, True])
async def test_prompt_that_fills_the_context_gets_an_empty_answer(
    chat: Any, logprobs: bool
) -> None:
    full = [TokenIds(ids=[1] + [400] * (CONTEXT_LENGTH - 1))]
    prediction = await continue_text(chat, prompt_ids=full, echo=True, logprobs=logprobs)
    assert prediction.finish_reason == FINISH_REASON_CONTEXT_LENGTH
    assert prediction.usage.completion_tokens == 0
    assert len(prediction.text) > CONTEXT_LENGTH
    assert len(prediction.tokens) == (CONTEXT_LENGTH if logprobs else 0)
    assert all(token.logprob < 0 for token in prediction.tokens[1:])


async def test_an_answer_of_no_tokens_scores_the_prompt(chat: Any) -> None:
    asked: Any = {"prompts": ["The llama is"], "echo": True, "logprobs": True}
    answered = await continue_text(chat, **asked)
    scored = await continue_text(chat, sampling=SamplingParams(max_gen_len=0), **asked)
    assert scored.text == "The llama is"
    assert scored.finish_reason == FINISH_REASON_LENGTH
    assert scored.usage.completion_tokens == 0
    assert scored.tokens == answered.tokens[: scored.usage.prompt_tokens]


async def test_answer_takes_what_its_own_prompt_leaves_whatever_its_neighbour(chat: Any) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    prompts = [TokenIds(ids=[1] + [400] * length) for length in (9, 199)]
    request = TextCompleteRequest(prompt_ids=prompts, sampling=endless)
    predictions = (await chat.TextComplete(request)).predictions
    assert [each.usage.completion_tokens for each in predictions] == [246, 56]


async def test_oldest_turns_are_dropped_and_counted(chat: Any) -> None:
    turn = [
        Message(role=ROLE_USER, content="the road crosses rivers on bridges of rope"),
        Message(role=ROLE_ASSISTANT, content="the road crosses rivers on bridges of rope"),
    ]
    system = Message(role=ROLE_SYSTEM, content="be brief")
    last = Message(role=ROLE_USER, content="hi")
    fields: Any = {"context_policy": CONTEXT_POLICY_DROP_OLDEST_TURNS}
    long = Dialog(messages=[system, *turn * 6, last])
    render = RenderPromptRequest(dialog=long, max_gen_len=1, **fields)
    rendered = await chat.RenderPrompt(render)
    kept = Dialog(messages=[system, *turn * (6 - rendered.dropped_turns), last])
    assert 0 < rendered.dropped_turns < 6
    assert rendered.ids == (await chat.RenderPrompt(RenderPromptRequest(dialog=kept))).ids
    assert rendered.prompt_tokens + rendered.remaining_tokens == CONTEXT_LENGTH
    request = ChatCompleteRequest(dialogs=[long], sampling=SamplingParams(max_gen_len=1), **fields)
    [prediction] = (await chat.ChatComplete(request)).predictions
    assert prediction.dropped_turns == rendered.dropped_turns
    assert prediction.usage.prompt_tokens == rendered.prompt_tokens


async def test_rendered_segments_are_metas_prompt_text(chat: Any) -> None:
    dialog = Dialog(
        messages=[
            Message(role=ROLE_SYSTEM, content="be brief"),
            Message(role=ROLE_USER, content=" one "),
            Message(role=ROLE_ASSISTANT, content=" two\n"),
            Message(role=ROLE_USER, content="three"),
        ]
    )
    rendered = await chat.RenderPrompt(RenderPromptRequest(dialog=dialog))
    assert list(rendered.segments) == [
        "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n one [/INST] two ",
        "[INST] three [/INST]",
    ]


async def test_streamed_characters_are_whole_though_tokens_are_bytes(chat: Any) -> None:
    llama = [3 + byte for byte in "🦙".encode()]
    biased = SamplingParams(temperature=0, max_gen_len=8, logit_bias=dict.fromkeys(llama, 100.0))
    dialog = Dialog(messages=[Message(role=ROLE_USER, content="?")])
    request = ChatCompleteRequest(dialogs=[dialog], sampling=biased)
    [unary] = (await chat.ChatComplete(request)).predictions
    streamed = chat.ChatCompleteStream(
        ChatCompleteStreamRequest(dialogs=[dialog], sampling=biased, logprobs=True)
    )
    events = [response.event async for response in streamed]
    assert "".join(event.delta.text for event in events) == unary.text
    assert {t.id for event in events for t in event.delta.tokens} <= set(llama)


async def test_model_tells_its_limits_and_defaults(chat: Any) -> None:
    model = await chat.GetModel(GetModelRequest())
    assert (model.name, model.context_length, model.vocab_size) == ("mha-mp1", 256, 560)
    assert (model.shards, model.replicas, model.dtype) == (1, 1, "float32")
    assert (model.limits.max_top_logprobs, model.limits.max_choices) == (20, 16)
    assert model.sampling_defaults.max_gen_len == CONTEXT_LENGTH - 1
    assert model.sampling_defaults.temperature == pytest.approx(0.6)
    assert model.sampling_defaults.HasField("min_p")
