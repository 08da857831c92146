"""The queue as clients of a gateway see it; the replica runs one sequence at a time."""

import asyncio
import contextlib
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
)
from llama.v1.model_pb2 import Timings
from llama.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams
from tests.error_details import violations


def request(content: str = "Hello", **fields: Any) -> ChatCompleteRequest:
    dialogs = [Dialog(messages=[Message(role=ROLE_USER, content=content)])]
    return ChatCompleteRequest(dialogs=dialogs, **fields)


def stream_request(content: str = "Hello", **fields: Any) -> ChatCompleteStreamRequest:
    dialogs = [Dialog(messages=[Message(role=ROLE_USER, content=content)])]
    return ChatCompleteStreamRequest(dialogs=dialogs, **fields)


async def until_taken(gateway: Any, **fields: Any) -> Any:
    """A stream with such a request, as soon as there is room for it."""
    while True:
        call = gateway.stub.ChatCompleteStream(stream_request(**fields))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call.read()
            return call


def sampling(max_gen_len: int) -> SamplingParams:
    """Lengths by which the replica's sequences are told apart."""
    return SamplingParams(max_gen_len=max_gen_len)


@pytest.fixture
async def narrow(start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any) -> Any:
    """A gateway that gives its replica one sequence at a time, and takes four."""
    address, _ = await start_server(model.service())
    gateway = await start_gateway(
        tokenizer_target,
        address,
        max_running_sequences=1,
        max_queued_sequences=4,
        max_dialogs=4,
        max_queued_tokens=300,
    )
    await gateway.until(serving=True)
    return gateway


async def test_next_in_the_queue_begins_when_the_running_one_ends(narrow: Any, model: Any) -> None:
    calls = [narrow.stub.ChatComplete(request(sampling=sampling(9), n=1)) for _ in range(3)]
    for _ in calls:
        start = await model.starts.get()
        assert model.starts.empty()
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    await asyncio.gather(*calls)


async def test_time_in_the_gateways_queue_counts_as_queued(narrow: Any, model: Any) -> None:
    call = asyncio.ensure_future(narrow.stub.ChatComplete(request(sampling=sampling(9), n=2)))
    queued = Timings()
    queued.queued.FromSeconds(3)
    for _ in range(2):
        start = await model.starts.get()
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP, timings=queued)
    first, second = ((each.usage.queue_time.ToMicroseconds()) for each in (await call).predictions)
    assert 3_000_000 <= first < second


async def test_cancelled_while_it_waits_never_reaches_a_replica(narrow: Any, model: Any) -> None:
    running = narrow.stub.ChatComplete(request(sampling=sampling(1)))
    first = await model.starts.get()
    waiting = await until_taken(narrow, sampling=sampling(2), n=2)
    await until_taken(narrow, sampling=sampling(3))
    waiting.cancel()
    await until_taken(narrow, sampling=sampling(4), n=2)  # as soon as the two are gone
    model.tell(first.sequence_id, finish_reason=FINISH_REASON_STOP)
    await running
    assert (await model.starts.get()).sampling.max_gen_len == 3


async def test_deadline_that_passes_in_the_queue_never_reaches_a_replica(
    narrow: Any, model: Any
) -> None:
    running = narrow.stub.ChatComplete(request(sampling=sampling(1)))
    first = await model.starts.get()
    with pytest.raises(grpc.aio.AioRpcError) as expired:
        await narrow.stub.ChatComplete(request(sampling=sampling(2)), timeout=0.2)
    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # A client's clock may be ahead of the gateway's: there is room for three when that one is gone.
    patient = await until_taken(narrow, sampling=sampling(3), n=3)
    model.tell(first.sequence_id, finish_reason=FINISH_REASON_STOP)
    await running
    assert (await model.starts.get()).sampling.max_gen_len == 3
    patient.cancel()


async def test_priority_goes_on_to_the_replica(narrow: Any, model: Any) -> None:
    call = narrow.stub.ChatComplete(request(priority=-7))
    assert (await model.starts.get()).priority == -7
    call.cancel()


@pytest.mark.parametrize("priority", [-101, 101])
async def test_priority_out_of_range_is_named(narrow: Any, priority: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await narrow.stub.ChatComplete(request(priority=priority))
    assert violations(refused.value) == [("priority", f"must be -100 to 100, not {priority}")]


async def test_refusal_tells_grpcs_own_retries_when_to_come_again(narrow: Any, model: Any) -> None:
    running = narrow.stub.ChatComplete(request(sampling=sampling(9), n=4))
    await model.starts.get()
    refused = narrow.stub.ChatComplete(request())
    assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(await refused.trailing_metadata())
    assert trailers["grpc-retry-pushback-ms"] == "1000"
    running.cancel()


async def test_tokens_above_the_bound_are_refused(narrow: Any) -> None:
    with pytest.raises(
        grpc.aio.AioRpcError, match="all requests together may take at most 300"
    ) as refused:
        await narrow.stub.ChatComplete(request(n=2))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
