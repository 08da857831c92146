"""The gateway's calls to the tokenizer service on the way of a request."""

import asyncio
import copy
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    TextCompleteRequest,
)
from llama.v1.tokenizer_pb2 import EncodeRequest, EncodeResponse
from llama.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server
from serving.server import Service
from tests.error_details import details
from tests.gateway.conftest import ScriptedModel, StartGateway, StartServer
from tests.gateway.messages import dialog
from tokenizer_service.server import TokenizerServicer, tokenizer_service
from tokenizer_service.tokenizer import Tokenizer


class HeldTokenizer(TokenizerServicer):
    """Encodes nothing: waits until its caller gives up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.time_remaining: asyncio.Queue[float | None] = asyncio.Queue()
        self.cancelled = asyncio.Event()

    async def Encode(self, _request: EncodeRequest, context: Any) -> EncodeResponse:
        self.time_remaining.put_nowait(context.time_remaining())
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError


async def test_deadline_and_cancellation_reach_the_tokenizer_service(
    start_gateway: Any, start_server: Any, tokenizer: Tokenizer, model: Any
) -> None:
    held = HeldTokenizer(tokenizer)

    def register(server: grpc.aio.Server) -> None:
        add_TokenizerServiceServicer_to_server(held, server)

    target, _ = await start_server(Service(names=["llama.v1.TokenizerService"], register=register))
    gateway = await start_gateway(target, (await start_server(model.service()))[0])
    await gateway.until(serving=True)
    call = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]), timeout=60)
    remaining = await held.time_remaining.get()
    assert remaining == pytest.approx(60, abs=5)
    call.cancel()
    await held.cancelled.wait()


class WatchedTokenizer(TokenizerServicer):
    """Keeps the requests that it gets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.requests: list[EncodeRequest] = []

    async def Encode(self, request: EncodeRequest, context: object) -> EncodeResponse:
        self.requests.append(request)
        return await super().Encode(request, context)


async def test_large_request_is_encoded_in_pieces(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer: Tokenizer,
    model: ScriptedModel,
) -> None:
    watched = WatchedTokenizer(tokenizer)
    model.info.context_length = 1_000_000

    def register(server: grpc.aio.Server) -> None:
        add_TokenizerServiceServicer_to_server(watched, server)

    target, _ = await start_server(Service(names=["llama.v1.TokenizerService"], register=register))
    gateway = await start_gateway(target, (await start_server(model.service()))[0])
    await gateway.until(serving=True)
    texts = [f"{number} " * 50_000 for number in range(5)]
    call = gateway.stub.TextComplete(TextCompleteRequest(prompts=texts))
    prompts = [list((await model.starts.get()).prompt_ids) for _ in texts]
    assert prompts == [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    assert [len(request.segments) for request in watched.requests] == [2, 2, 1]
    call.cancel()


async def test_prompt_above_the_tokenizer_services_limit_is_refused(
    start_gateway: Any, start_server: Any, tokenizer: Tokenizer, model: Any
) -> None:
    target, _ = await start_server(tokenizer_service(tokenizer), max_request_bytes=1000)
    gateway = await start_gateway(target, (await start_server(model.service()))[0])
    await gateway.until(serving=True)
    with pytest.raises(grpc.aio.AioRpcError, match="too large for the tokenizer") as refused:
        await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog("x" * 1000)]))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    [quota] = details(refused.value)  # and no time after which it would go better
    assert quota.violations[0].subject == "max_request_bytes"


async def test_tokenizer_service_with_another_model_file_is_not_used(
    start_gateway: Any, start_server: Any, tokenizer: Tokenizer, model: Any, log: Any
) -> None:
    target, server = await start_server(tokenizer_service(tokenizer))
    gateway = await start_gateway(target, (await start_server(model.service()))[0])
    await gateway.until(serving=True)
    await server.aclose()
    await gateway.until(serving=False)
    other = copy.copy(tokenizer)
    other.fingerprint = "f" * 64
    await start_server(tokenizer_service(other), port=int(target.rpartition(":")[2]))
    refusals = [await log.wait_for("upstream unusable") for _ in range(2)]
    assert "serves another model file (ffffffffffff)" in refusals[-1]["reason"]


async def test_rendering_a_prompt_takes_a_place_as_long_as_it_is_encoded(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    one = {"max_queued_sequences": 1, "max_dialogs": 1}
    gateway = await start_gateway(tokenizer_target, address, **one)
    await gateway.until(serving=True)
    hello = Dialog(messages=[Message(role=ROLE_USER, content="Hello")])
    render = RenderPromptRequest(dialog=hello)
    assert (await gateway.stub.RenderPrompt(render)).prompt_tokens > 0
    assert (await gateway.stub.RenderPrompt(render)).prompt_tokens > 0
    running = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[hello]))
    await model.starts.get()
    with pytest.raises(grpc.aio.AioRpcError, match="the queue is full: 1 of 1 sequences") as full:
        await gateway.stub.RenderPrompt(render)
    assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    running.cancel()
