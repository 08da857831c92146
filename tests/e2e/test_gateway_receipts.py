"""The receipt of an answer: its parameters, what ended it, and its tokens' ranks."""

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    GetModelRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.sampling_pb2 import (
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_STOP_STRING,
    SamplingParams,
)

PROMPT = "The llama is"


async def complete(chat: Any, sampling: SamplingParams, **fields: Any) -> Any:
    request = TextCompleteRequest(prompts=[PROMPT], sampling=sampling, **fields)
    [prediction] = (await chat.TextComplete(request)).predictions
    return prediction


async def test_response_says_its_id_time_and_model(chat: Any) -> None:
    model = (await chat.GetModel(GetModelRequest())).name
    fields: Any = {"prompts": [PROMPT, "Two"], "sampling": SamplingParams(max_gen_len=1)}
    unary = await chat.TextComplete(TextCompleteRequest(model=model, **fields))
    stream = chat.TextCompleteStream(TextCompleteStreamRequest(**fields))
    events = [response.event async for response in stream]
    started = [event.started for event in events if event.HasField("started")]
    assert (unary.model, {each.model for each in started}) == (model, {model})
    assert len({unary.id, *(each.id for each in started)}) == 2
    assert datetime.now(tz=UTC) - unary.created.ToDatetime(tzinfo=UTC) < timedelta(minutes=5)


@pytest.mark.parametrize("method", ["TextComplete", "GetModel"])
async def test_another_model_is_not_found(chat: Any, method: str) -> None:
    other = {"TextComplete": TextCompleteRequest(model="other", prompts=["a"])}
    request = other.get(method, GetModelRequest(model="other"))
    with pytest.raises(grpc.aio.AioRpcError, match="model: 'other' is not served here") as refused:
        await getattr(chat, method)(request)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_long_name_of_another_model_leaves_room_for_the_served_one(chat: Any) -> None:
    served = (await chat.GetModel(GetModelRequest())).name
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await chat.GetModel(GetModelRequest(model="x" * 10_000))
    message = f"model: '{'x' * 64}…' is not served here, '{served}' is"
    assert refused.value.details() == message


async def test_receipt_repeats_the_answer(chat: Any) -> None:
    asked = SamplingParams(temperature=1.5, top_p=1, max_gen_len=30, stop=["zzz"])
    first = await complete(chat, asked, logprobs=True)
    assert (first.sampling.stop, first.sampling.min_p) == (["zzz"], 0)
    again = await complete(chat, first.sampling, logprobs=True)
    assert [token.id for token in again.tokens] == [token.id for token in first.tokens]
    assert again.sampling == first.sampling


async def test_ranks_and_requested_logprobs_agree_with_the_most_probable(chat: Any) -> None:
    sampling = SamplingParams(temperature=3, top_p=1, seed=4, max_gen_len=24, ignore_eos=True)
    details: Any = {"logprobs": True, "top_logprobs": 20, "echo": True}
    prediction = await complete(chat, sampling, logprob_token_ids=[9, 7, 300], **details)
    first, *tokens = prediction.tokens
    assert (first.rank, len(first.requested_logprobs)) == (0, 0)
    assert max(token.rank for token in tokens) > 20 > min(token.rank for token in tokens)
    for token in tokens:
        best = {each.id: each.logprob for each in token.top_logprobs}
        higher = sum(logprob > token.logprob for logprob in best.values())
        assert token.rank == 1 + higher if token.id in best else token.rank > 20
        assert [each.id for each in token.requested_logprobs] == [9, 7, 300]
        for each in token.requested_logprobs:
            if each.id in {*best, token.id}:
                assert each.logprob == best.get(each.id, token.logprob)
            else:
                assert each.logprob <= min(best.values())


async def test_answer_tells_what_ended_it(chat: Any) -> None:
    whole = await complete(chat, SamplingParams(temperature=0, max_gen_len=9), logprobs=True)
    assert (whole.finish_reason, whole.WhichOneof("stopped_by")) == (FINISH_REASON_LENGTH, None)
    third = whole.tokens[3]
    by_id = await complete(chat, SamplingParams(temperature=0, stop_token_ids=[third.id]))
    assert (by_id.finish_reason, by_id.stop_token_id) == (FINISH_REASON_STOP, third.id)
    stop = whole.text[4:7]
    by_string = await complete(chat, SamplingParams(temperature=0, stop=["zzz", stop]))
    assert (by_string.finish_reason, by_string.stop_string) == (FINISH_REASON_STOP_STRING, stop)
    full = await complete(chat, SamplingParams(temperature=0, ignore_eos=True))
    assert full.finish_reason == FINISH_REASON_CONTEXT_LENGTH
    assert full.sampling.max_gen_len == full.usage.completion_tokens


async def test_neither_a_stop_token_nor_a_stop_string_ends_an_answer_that_is_too_short(
    chat: Any,
) -> None:
    whole = await complete(chat, SamplingParams(temperature=0, max_gen_len=20), logprobs=True)
    ends: Any = {"stop_token_ids": [whole.tokens[1].id], "stop": [whole.text[2:4]]}
    least = SamplingParams(temperature=0, max_gen_len=20, min_gen_len=12, **ends)
    prediction = await complete(chat, least)
    assert prediction.usage.completion_tokens >= 12


@pytest.mark.parametrize(
    ("sampling", "fields", "message"),
    [
        ({"min_gen_len": 5, "max_gen_len": 4}, {}, "sampling.min_gen_len: must be at most max_gen"),
        ({}, {"logprob_token_ids": [1]}, "logprob_token_ids: needs logprobs"),
        ({}, {"logprobs": True, "logprob_token_ids": [1] * 21}, "must hold at most 20 entries"),
        ({}, {"logprobs": True, "logprob_token_ids": [9**9]}, "logprob_token_ids[0]: must be less"),
    ],
)
async def test_wrong_values_are_refused(
    chat: Any, sampling: Any, fields: Any, message: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await complete(chat, SamplingParams(**sampling), **fields)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in (refused.value.details() or "")
