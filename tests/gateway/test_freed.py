"""The memory of a request is free with its answer, without the garbage collector's help: that runs
rarely, and frames that wait for it hold megabytes of requests.
"""

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message as ProtoMessage

from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    DetokenizeRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    ResumeStreamRequest,
    ScoreRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
    TokenizeRequest,
)
from llama.v1.model_pb2 import SequenceError
from llama.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams, TokenIds
from tests.gateway.conftest import RunningGateway, ScriptedModel

Freed = Callable[[], Awaitable[None]]

LONG = "x" * 100_000
FITS_BY_ITS_BYTES = "x" * 1500  # and has more tokens than the context all the same
CHAT = [Dialog(messages=[Message(role=ROLE_USER, content="?")])]

REFUSED = {
    "ids": TextCompleteRequest(prompt_ids=[TokenIds(ids=[5] * 10_000)]),
    "text": TextCompleteRequest(prompts=[LONG]),
    "encoded": TextCompleteRequest(prompts=[FITS_BY_ITS_BYTES]),
    "stream": TextCompleteStreamRequest(prompts=[LONG]),
    "encoded_stream": TextCompleteStreamRequest(prompts=[FITS_BY_ITS_BYTES]),
    "named_stream": TextCompleteStreamRequest(prompts=[LONG], stream_name="name"),
    "bad_named_stream": TextCompleteStreamRequest(prompts=["a"], stream_name="a name"),
    "dialog": ChatCompleteRequest(
        dialogs=[Dialog(messages=[Message(role=ROLE_USER, content=LONG)])]
    ),
    "roles": ChatCompleteStreamRequest(
        dialogs=[Dialog(messages=[Message(role=ROLE_ASSISTANT, content=LONG)])]
    ),
    "sampling": ChatCompleteRequest(dialogs=CHAT, sampling=SamplingParams(temperature=-1)),
    "score": ScoreRequest(prompt=LONG, candidates=["a"]),
    "encoded_score": ScoreRequest(prompt="a", candidates=["b", FITS_BY_ITS_BYTES]),
    "tokenize": TokenizeRequest(texts=[LONG] * 2, dialogs=CHAT),
    "detokenize": DetokenizeRequest(sequences=[TokenIds(ids=[5] * 10_000 + [9999])]),
    "render": RenderPromptRequest(
        dialog=Dialog(messages=[Message(role=ROLE_USER, content=FITS_BY_ITS_BYTES)])
    ),
}


def requests() -> list[ProtoMessage]:
    """Those that something holds."""
    kinds = {type(each) for each in REFUSED.values()}
    return [each for each in gc.get_objects() if type(each) in kinds]


@pytest.fixture
def freed() -> Iterator[Callable[[], Awaitable[None]]]:
    """Waits, without a collector, until no request is held that was not before the test."""
    gc.collect()
    gc.disable()
    before = requests()
    known = {id(each) for each in before}

    async def wait() -> None:
        async with asyncio.timeout(60):  # the client has the status before the handler has ended
            while True:
                if all(id(each) in known for each in requests()):
                    return
                await asyncio.sleep(0.01)

    yield wait
    gc.enable()


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_request_is_freed_with_its_answer(
    gateway: RunningGateway, freed: Freed, name: str
) -> None:
    request = REFUSED[name]
    method = type(request).__name__.removesuffix("Request")
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        # The bytes, so that the requests in this process are the gateway's.
        call: Any = channel.unary_stream(f"/llama.v1.ChatService/{method}")
        for _ in range(3):
            answers = call(request.SerializeToString())
            assert await answers.code() is grpc.StatusCode.INVALID_ARGUMENT
    await freed()


@pytest.mark.parametrize("name", ["text", "stream", "dialog", "roles"])
async def test_text_of_a_refused_request_is_freed_with_its_answer(
    gateway: RunningGateway, freed: Freed, name: str
) -> None:
    request, count = REFUSED[name], 20
    method = type(request).__name__.removesuffix("Request")
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call: Any = channel.unary_stream(f"/llama.v1.ChatService/{method}")
        await call(request.SerializeToString()).code()
        await freed()
        tracemalloc.start()
        for _ in range(count):
            await call(request.SerializeToString()).code()
        await freed()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held < count * len(LONG) / 4


LASTING = {
    "chat": ChatCompleteRequest(dialogs=CHAT),
    "chat_stream": ChatCompleteStreamRequest(dialogs=CHAT),
    "text": TextCompleteRequest(prompts=["a"]),
    "text_stream": TextCompleteStreamRequest(prompts=["a"]),
    "score": ScoreRequest(prompt="a", candidates=["b"]),
    "named_stream": TextCompleteStreamRequest(prompt_ids=[TokenIds(ids=[5])], stream_name="name"),
}


@pytest.mark.parametrize("name", LASTING)
async def test_request_is_not_held_while_its_answers_are_made(
    gateway: RunningGateway, model: ScriptedModel, freed: Freed, name: str
) -> None:
    request = LASTING[name]
    method = type(request).__name__.removesuffix("Request")
    serialized = request.SerializeToString()
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call: Any = channel.unary_stream(f"/llama.v1.ChatService/{method}")
        answers = call(serialized)
        start = await model.starts.get()
        await freed()
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
        assert [answer async for answer in answers]


async def test_ended_named_stream_keeps_its_events_and_not_its_request(
    gateway: RunningGateway, model: ScriptedModel, freed: Freed
) -> None:
    request = TextCompleteStreamRequest(prompts=["a"], stream_name="name").SerializeToString()
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call: Any = channel.unary_stream("/llama.v1.ChatService/TextCompleteStream")
        answers = call(request)
        start = await model.starts.get()
        await anext(aiter(answers))
        answers.cancel()
    model.tell(start.sequence_id, error=SequenceError(code=13, message="broken"))
    await freed()
    resumed = gateway.stub.ResumeStream(ResumeStreamRequest(stream_name="name"))
    with pytest.raises(grpc.aio.AioRpcError, match="broken"):
        _ = [response.event async for response in resumed]
