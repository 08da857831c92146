"""The classifier that asks a model: a real gateway serves what the test lets the guard say."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status.rpc_status import from_call

from llama.prompt_format.dialog import USER
from llama.prompt_format.dialog import Message as Turn
from llama.prompt_format.llama_guard import render
from llama.v1.chat_pb2 import ROLE_ASSISTANT, ROLE_SYSTEM, ROLE_USER, Dialog, Message
from llama.v1.safety_pb2 import VERDICT_SAFE, VERDICT_UNSAFE, ClassifyRequest
from llama.v1.safety_pb2_grpc import SafetyServiceStub
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from safety_service.llama_guard import LlamaGuard
from safety_service.server import safety_service
from serving.server import channel
from tokenizer_service.tokenizer import Tokenizer

POLICY = "O1: No."


@pytest.fixture
async def guard_target(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any
) -> str:
    """The address of a gateway in front of `model`, whose context holds the prompt of a turn."""
    model.info.context_length = 700
    gateway = await start_gateway(tokenizer_target, (await start_server(model.service()))[0])
    await gateway.until(serving=True)
    return str(gateway.address)


@pytest.fixture
async def guard(guard_target: str, start_server: Any, servers: AsyncExitStack) -> Any:
    """A client of the safety service in front of it."""
    classifier = LlamaGuard(guard_target, POLICY)
    address, _ = await start_server(safety_service(classifier, classifier.run))
    return SafetyServiceStub(await servers.enter_async_context(channel(address)))


def answer(model: Any, sequence_id: str, text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, bos=False, eos=False)
    model.tell(sequence_id, ids=ids, finish_reason=FINISH_REASON_STOP)


async def test_guard_is_asked_greedily_with_its_prompt_and_its_answer_is_the_verdict(
    guard: Any, model: Any, tokenizer: Tokenizer
) -> None:
    call = guard.Classify(ClassifyRequest(text="How do llamas spit?"))
    start = await model.starts.get()
    prompt = render(POLICY, [Turn(USER, "How do llamas spit?")])
    assert list(start.prompt_ids) == tokenizer.encode(prompt, bos=True, eos=False)
    assert start.sampling.temperature == 0
    answer(model, start.sequence_id, "unsafe\nO1,O3", tokenizer)
    response = await call
    assert response.verdict == VERDICT_UNSAFE
    assert response.categories == ["O1", "O3"]


async def test_dialog_that_is_too_long_loses_its_oldest_turns(
    guard: Any, model: Any, tokenizer: Tokenizer
) -> None:
    messages = [Message(role=ROLE_SYSTEM, content="Be kind.")]
    for number in range(40):
        role = ROLE_ASSISTANT if number % 2 else ROLE_USER
        messages.append(Message(role=role, content=f"turn {number}"))
    call = guard.Classify(ClassifyRequest(dialog=Dialog(messages=messages)))
    start = await model.starts.get()
    prompt = tokenizer.decode(list(start.prompt_ids))
    assert "Agent: turn 39" in prompt
    assert "<BEGIN CONVERSATION>\n\nUser: turn " in prompt
    assert "turn 0\n" not in prompt
    assert "Be kind." not in prompt
    answer(model, start.sequence_id, "safe", tokenizer)
    assert (await call).verdict == VERDICT_SAFE


@pytest.mark.parametrize("said", ["maybe", ""])
async def test_answer_that_is_no_verdict_is_unavailable(
    guard: Any, model: Any, tokenizer: Tokenizer, said: str
) -> None:
    call = guard.Classify(ClassifyRequest(text="Hello"))
    answer(model, (await model.starts.get()).sequence_id, said, tokenizer)
    with pytest.raises(grpc.aio.AioRpcError, match="neither safe nor unsafe") as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    status: Any = from_call(failed.value)  # type: ignore[arg-type]  # made for grpc.Call
    assert status.details[0].Is(RetryInfo.DESCRIPTOR)


async def test_text_that_does_not_fit_is_unavailable(guard: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="no answer: INVALID_ARGUMENT") as failed:
        await guard.Classify(ClassifyRequest(text="llama " * 1000))
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_call_that_is_cancelled_frees_the_guards_sequence(guard: Any, model: Any) -> None:
    call = asyncio.ensure_future(guard.Classify(ClassifyRequest(text="Hello")))
    start = await model.starts.get()
    call.cancel()
    assert await model.cancels.get() == start.sequence_id
