"""Several answers to one dialog or prompt, from scripted replicas."""

import asyncio
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    GetModelRequest,
    TextCompleteStreamRequest,
)
from llama.v1.model_pb2 import StartSequence
from llama.v1.sampling_pb2 import FINISH_REASON_SPECIAL_TAGS, FINISH_REASON_STOP, SamplingParams
from tests.gateway.messages import dialog
from tokenizer_service.tokenizer import Tokenizer


async def starts(model: Any, count: int) -> list[StartSequence]:
    return [await model.starts.get() for _ in range(count)]


async def test_answers_share_a_prompt_and_count_seeds_up_from_the_given_one(
    gateway: Any, model: Any
) -> None:
    sampling = SamplingParams(seed=2**64 - 2)
    request = ChatCompleteRequest(dialogs=[dialog()], sampling=sampling, n=4)
    call = asyncio.ensure_future(gateway.stub.ChatComplete(request))
    begun = await starts(model, 4)
    for start in begun:
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    predictions = (await call).predictions
    assert len({tuple(start.prompt_ids) for start in begun}) == 1
    assert len({start.sequence_id for start in begun}) == 4
    assert [start.sampling.seed for start in begun] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert [each.sampling.seed for each in predictions] == [2**64 - 2, 2**64 - 1, 0, 1]


async def test_one_seed_is_drawn_for_each_dialog(gateway: Any, model: Any) -> None:
    request = ChatCompleteStreamRequest(dialogs=[dialog()] * 2, n=3)
    call = gateway.stub.ChatCompleteStream(request)
    seeds = [start.sampling.seed for start in await starts(model, 6)]
    call.cancel()
    first, other = seeds[0], seeds[3]
    assert first != other
    assert seeds == [(base + i) % 2**64 for base in (first, other) for i in range(3)]


async def test_predictions_come_dialog_by_dialog_whatever_ends_first(
    gateway: Any, model: Any, tokenizer: Tokenizer
) -> None:
    request = ChatCompleteRequest(dialogs=[dialog("a"), dialog("[INST]"), dialog("b")], n=2)
    call = asyncio.ensure_future(gateway.stub.ChatComplete(request))
    words = ["grass", "leaves", "straw", "hay"]
    for start, word in reversed(list(zip(await starts(model, 4), words, strict=True))):
        ids = tokenizer.encode(word, bos=False, eos=False)
        model.tell(start.sequence_id, ids=ids, finish_reason=FINISH_REASON_STOP)
    predictions = (await call).predictions
    refusal = "Error: special tags are not allowed as part of the prompt."
    assert [each.text for each in predictions] == [
        *("grass", "leaves"),
        *(refusal, refusal),
        *("straw", "hay"),
    ]
    assert [each.choice_index for each in predictions] == [0, 1] * 3
    assert [each.finish_reason == FINISH_REASON_SPECIAL_TAGS for each in predictions[2:4]] == [
        True
    ] * 2


async def test_stream_events_tell_their_prompt_and_choice(
    gateway: Any, model: Any, tokenizer: Tokenizer
) -> None:
    call = gateway.stub.TextCompleteStream(TextCompleteStreamRequest(prompts=["one", "two"], n=2))
    for start in reversed(await starts(model, 4)):
        ids = tokenizer.encode("x", bos=False, eos=False)
        model.tell(start.sequence_id, ids=ids, finish_reason=FINISH_REASON_STOP)
    events = [response.event async for response in call]
    kinds = [event.WhichOneof("kind") for event in events]
    bodies = [getattr(event, kind) for event, kind in zip(events, kinds, strict=True)]
    places = [(body.index, body.choice_index) for body in bodies]
    in_order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert kinds == ["started"] * 4 + ["delta", "finished"] * 4
    assert places == in_order + [place for place in reversed(in_order) for _ in range(2)]
    assert [event.event_number for event in events] == list(range(1, 13))


async def test_every_answer_takes_its_room_in_the_queue(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_queued_sequences=4, max_dialogs=4)
    await gateway.until(serving=True)
    running = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()], n=3))
    await starts(model, 3)
    pair = ChatCompleteRequest(dialogs=[dialog()], n=2)
    with pytest.raises(grpc.aio.AioRpcError, match=r"3 of 4 sequences run or wait, and .* has 2"):
        await gateway.stub.ChatComplete(pair)
    running.cancel()
    assert len({await model.cancels.get() for _ in range(3)}) == 3


async def test_limit_of_answers_is_a_setting_and_is_told(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_choices=2)
    await gateway.until(serving=True)
    assert (await gateway.stub.GetModel(GetModelRequest())).limits.max_choices == 2
    with pytest.raises(grpc.aio.AioRpcError, match="n: must be 1 to 2, not 3") as refused:
        await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()], n=3))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
