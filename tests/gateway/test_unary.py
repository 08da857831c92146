"""The size of a unary answer: beyond it a request is refused, or stopped."""

from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    Dialog,
    GetModelRequest,
    Message,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.model_pb2 import TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams
from tests.error_details import violations
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer

LIMIT = 16 * 1024
DETAILS: dict[str, Any] = {"logprobs": True, "top_logprobs": 20}
DIALOG = Dialog(messages=[Message(role=ROLE_USER, content="?")])


@pytest.fixture
async def limited(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> RunningGateway:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_response_bytes=LIMIT)
    await gateway.until(serving=True)
    return gateway


def top(count: int) -> list[TopLogprobs]:
    return [TopLogprobs(ids=range(300, 300 + count), logprobs=[-1] * count)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (TextCompleteRequest(prompts=["a"], **DETAILS), "top_logprobs"),
        (ChatCompleteRequest(dialogs=[DIALOG], **DETAILS), "top_logprobs"),
        (ChatCompleteRequest(dialogs=[DIALOG] * 4, logprobs=True), "logprobs"),
        (ChatCompleteRequest(dialogs=[DIALOG], logprobs=True, n=4), "logprobs"),
    ],
)
async def test_token_details_that_could_be_too_many_are_refused_before_the_work(
    limited: RunningGateway, model: ScriptedModel, request_: Any, field: str
) -> None:
    method: Any = getattr(limited.stub, type(request_).__name__.removesuffix("Request"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await method(request_)
    [(named, rule)] = violations(error.value)
    assert named == field
    assert "answers of up to 255 tokens could take about" in rule
    assert f"a unary answer may have {LIMIT}" in rule
    assert model.starts.empty()


async def test_fewer_tokens_or_a_stream_may_have_them(
    limited: RunningGateway, model: ScriptedModel
) -> None:
    short = SamplingParams(max_gen_len=10)
    answer = limited.stub.TextComplete(
        TextCompleteRequest(prompts=["a"], sampling=short, **DETAILS)
    )
    start = await model.starts.get()
    model.tell(start.sequence_id, ids=[300], logprobs=[-1], top=top(20))
    model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    [prediction] = (await answer).predictions
    assert len(prediction.tokens[0].top_logprobs) == 20
    stream = limited.stub.TextCompleteStream(TextCompleteStreamRequest(prompts=["a"], **DETAILS))
    assert (await anext(aiter(stream))).event.HasField("started")
    stream.cancel()


async def test_answer_that_outgrows_the_limit_is_stopped(
    limited: RunningGateway, model: ScriptedModel
) -> None:
    answer = limited.stub.TextComplete(TextCompleteRequest(prompts=["a"]))
    start = await model.starts.get()
    for _ in range(40):
        model.tell(start.sequence_id, ids=[300] * 200)
    with pytest.raises(grpc.aio.AioRpcError, match=f"the answer has more than {LIMIT} bytes") as e:
        await answer
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await model.cancels.get() == start.sequence_id


async def test_answer_is_stopped_while_it_still_fits(
    limited: RunningGateway, model: ScriptedModel
) -> None:
    """The bytes are counted while it grows, with some to spare."""
    request = TextCompleteRequest(prompts=["a"], sampling=SamplingParams(max_gen_len=25), **DETAILS)
    sizes: list[int] = []
    stopped = None
    while stopped is None:
        answer = limited.stub.TextComplete(request)
        start = await model.starts.get()
        for _ in range(2 * len(sizes)):
            model.tell(start.sequence_id, ids=[300], logprobs=[-1], top=top(20))
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
        try:
            sizes.append((await answer).ByteSize())
        except grpc.aio.AioRpcError as error:
            stopped = error.code()
    assert stopped is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert LIMIT * 0.8 < sizes[-1] <= LIMIT


async def test_limit_is_told(limited: RunningGateway) -> None:
    limits = (await limited.stub.GetModel(GetModelRequest())).limits
    assert limits.max_response_bytes == LIMIT
