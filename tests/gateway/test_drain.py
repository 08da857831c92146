"""A gateway that shuts down, as its clients see it."""

import asyncio
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    Dialog,
    Message,
    RenderPromptRequest,
    ResumeStreamRequest,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.sampling_pb2 import FINISH_REASON_STOP

MESSAGE = "this gateway is shutting down"


@pytest.fixture
async def patient(start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any) -> Any:
    """A gateway that gives what runs a minute."""
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, grace_period=60)
    await gateway.until(serving=True)
    return gateway


async def begin(gateway: Any, name: str) -> Any:
    """A named stream that has begun."""
    request = TextCompleteStreamRequest(prompts=["Once"], stream_name=name)
    call = gateway.stub.TextCompleteStream(request)
    await call.read()
    return call


async def until_refused(gateway: Any) -> grpc.aio.AioRpcError:
    """Why the gateway takes no requests for answers any more."""
    while True:
        call = gateway.stub.TextComplete(TextCompleteRequest(prompts=["Once"]))
        done, _ = await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=0.05)
        call.cancel()
        if done:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            return refused.value


async def test_no_named_stream_begins_once_health_says_not_serving(
    patient: Any, model: Any
) -> None:
    await begin(patient, "runs")
    start = await model.starts.get()
    stopping = asyncio.create_task(patient.server.aclose())
    await patient.until(serving=False)
    with pytest.raises(grpc.aio.AioRpcError, match=MESSAGE) as refused:
        await begin(patient, "late")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    await stopping


async def test_named_stream_that_loses_its_reader_is_resumed_while_the_gateway_drains(
    patient: Any, model: Any
) -> None:
    reading = await begin(patient, "runs")
    start = await model.starts.get()
    stopping = asyncio.create_task(patient.server.aclose())
    assert MESSAGE in str((await until_refused(patient)).details())
    reading.cancel()
    resumed = patient.stub.ResumeStream(
        ResumeStreamRequest(stream_name="runs", after_event_number=1)
    )
    await resumed.initial_metadata()
    model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    response = await resumed.read()
    assert response.event.finished.finish_reason == FINISH_REASON_STOP
    await stopping


async def test_prompts_are_not_rendered_while_the_gateway_drains(patient: Any, model: Any) -> None:
    await begin(patient, "runs")
    start = await model.starts.get()
    stopping = asyncio.create_task(patient.server.aclose())
    await until_refused(patient)
    dialog = Dialog(messages=[Message(role=ROLE_USER, content="Hello")])
    with pytest.raises(grpc.aio.AioRpcError, match=MESSAGE):
        await patient.stub.RenderPrompt(RenderPromptRequest(dialog=dialog))
    model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    await stopping
