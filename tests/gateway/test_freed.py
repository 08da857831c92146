"""What a request took is free with its answer, without the garbage collector's help: that runs
seldom, and frames that wait for it hold megabytes of requests.
"""

import asyncio
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message as ProtoMessage

from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    ResumeStreamRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.model_pb2 import SequenceError
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from tests.gateway.conftest import RunningGateway, ScriptedModel

LONG = "x" * 100_000
FITS_BY_ITS_BYTES = "x" * 1500  # and has more tokens than the context all the same
CHAT = [Dialog(messages=[Message(role=ROLE_USER, content="?")])]

REFUSED = {
    "ids": TextCompleteRequest(prompt_ids=[TokenIds(ids=[5] * 10_000)]),
    "text": TextCompleteRequest(prompts=[LONG]),
    "encoded": TextCompleteRequest(prompts=[FITS_BY_ITS_BYTES]),
    "stream": TextCompleteStreamRequest(prompts=[LONG]),
    "encoded_stream": TextCompleteStreamRequest(prompts=[FITS_BY_ITS_BYTES]),
    "named_stream": TextCompleteStreamRequest(prompts=[LONG], request_id="name"),
    "bad_named_stream": TextCompleteStreamRequest(prompts=["a"], request_id="a name"),
    "dialog": ChatCompleteRequest(
        dialogs=[Dialog(messages=[Message(role=ROLE_USER, content=LONG)])]
    ),
    "roles": ChatCompleteStreamRequest(
        dialogs=[Dialog(messages=[Message(role=ROLE_ASSISTANT, content=LONG)])]
    ),
    "sampling": ChatCompleteRequest(dialogs=CHAT, sampling=SamplingParams(temperature=-1)),
    "render": RenderPromptRequest(
        dialog=Dialog(messages=[Message(role=ROLE_USER, content=FITS_BY_ITS_BYTES)])
    ),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def until_freed(but: Sequence[ProtoMessage] = ()) -> None:
    """Waits until nothing holds a request, but for those of the tests."""
    kinds = {type(each) for each in REFUSED.values()}
    kept = {id(each) for each in (*REFUSED.values(), *but)}
    async with asyncio.timeout(60):  # the client has the status before the handler has ended
        while True:
            if all(type(each) not in kinds or id(each) in kept for each in gc.get_objects()):
                return
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", REFUSED)
async def test_refused_request_is_freed_with_its_answer(gateway: RunningGateway, name: str) -> None:
    request = REFUSED[name]
    method = type(request).__name__.removesuffix("Request")
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        # The bytes, so that the requests in this process are the gateway's.
        call: Any = channel.unary_stream(f"/llama.v1.ChatService/{method}")
        for _ in range(3):
            answers = call(request.SerializeToString())
            assert await answers.code() is grpc.StatusCode.INVALID_ARGUMENT
    await until_freed()


@pytest.mark.usefixtures("no_collector")
async def test_ended_named_stream_keeps_its_events_and_not_its_request(
    gateway: RunningGateway, model: ScriptedModel
) -> None:
    request = TextCompleteStreamRequest(prompts=["a"], request_id="name")
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call: Any = channel.unary_stream("/llama.v1.ChatService/TextCompleteStream")
        answers = call(request.SerializeToString())
        start = await model.starts.get()
        await anext(aiter(answers))
        answers.cancel()
    model.tell(start.request_id, error=SequenceError(code=13, message="broken"))
    await until_freed(but=[request])
    resumed = gateway.stub.ResumeStream(ResumeStreamRequest(request_id="name"))
    with pytest.raises(grpc.aio.AioRpcError, match="broken"):
        _ = [event async for event in resumed]
