"""A full queue as clients with two keys see it: who gives way, and what it is told."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
from grpc_status.rpc_status import aio as rpc_status

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    ResumeStreamRequest,
)
from llama.v1.operator_pb2 import GetStatusRequest, GetStatusResponse
from llama.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams
from serving.security.keys import key_digest
from serving.server import channel

NAMES = ("ann", "ben")
MAX_RUNNING = 80  # the replica runs 64 at once, and is given a quarter more


def by(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a key's calls."""
    return (("authorization", f"Bearer {name}"),)


def fields(**more: Any) -> dict[str, Any]:
    dialogs = [Dialog(messages=[Message(role=ROLE_USER, content="Hello")])]
    return {"dialogs": dialogs, **more}


def length(max_gen_len: int) -> SamplingParams:
    """Lengths by which the replica's sequences are told apart."""
    return SamplingParams(max_gen_len=max_gen_len)


async def leave_streams(gateway: Any, count: int, **more: Any) -> list[str]:
    """Begins named streams of Ann's one after the other, and disconnects; returns their names."""
    names = [f"stream-{number}" for number in range(count)]
    async with channel(gateway.address) as anns:
        stub = type(gateway.stub)(anns)
        for name in names:
            request = ChatCompleteStreamRequest(**fields(stream_name=name, **more))
            await stub.ChatCompleteStream(request, metadata=by("ann")).read()
    return names


def chat(gateway: Any, **more: Any) -> Any:
    """A chat of Ben's."""
    return gateway.stub.ChatComplete(ChatCompleteRequest(**fields(**more)), metadata=by("ben"))


async def status(gateway: Any) -> GetStatusResponse:
    found: GetStatusResponse = await gateway.operator.GetStatus(
        GetStatusRequest(), metadata=by("ben")
    )
    return found


async def quotas(call: Any) -> list[str]:
    """The reason for which a call was refused; it is told when to try again."""
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = await rpc_status.from_call(call)
    assert found is not None
    retry, failure = RetryInfo(), QuotaFailure()
    for packed, detail in zip(found.details, (retry, failure), strict=True):
        assert packed.Unpack(detail)
    assert retry.retry_delay.ToMilliseconds() >= 1000
    return [each.subject for each in failure.violations]


@pytest.fixture
async def shared(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any, tmp_path: Path
) -> Any:
    """Starts a gateway that two keys share."""
    entries = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{key_digest(name)}"\n'
        'permissions = ["generate", "operate"]\n'
        for name in NAMES
    ]
    keys = tmp_path / "keys.toml"
    keys.write_text("".join(entries))
    address, _ = await start_server(model.service())

    async def start(**settings: Any) -> Any:
        gateway = await start_gateway(tokenizer_target, address, api_keys=keys, **settings)
        await gateway.until(serving=True)
        return gateway

    return start


async def test_key_that_fills_the_queue_and_leaves_does_not_keep_another_out(
    shared: Any, model: Any
) -> None:
    gateway = await shared()
    await leave_streams(gateway, 16, n=16, priority=-100)
    starts = [await model.starts.get() for _ in range(MAX_RUNNING)]
    answer = chat(gateway, sampling=length(9))
    while not answer.done() and (await status(gateway)).queued_sequences <= 256 - MAX_RUNNING:
        pass
    model.tell(starts[0].sequence_id, finish_reason=FINISH_REASON_STOP)
    next_start = await model.starts.get()
    assert next_start.sampling.max_gen_len == 9
    model.tell(next_start.sequence_id, finish_reason=FINISH_REASON_STOP)
    assert len((await answer).predictions) == 1


async def test_displaced_stream_tells_why_also_whoever_resumes_it(shared: Any, model: Any) -> None:
    gateway = await shared(max_running_sequences=1, max_queued_sequences=8, max_dialogs=8)
    *_, newest = await leave_streams(gateway, 4, n=2)
    await model.starts.get()
    answer = chat(gateway, n=4)
    resumed = gateway.stub.ResumeStream(
        ResumeStreamRequest(stream_name=newest, after_event_number=2), metadata=by("ann")
    )
    assert await quotas(resumed) == ["key.share"]
    assert "the key's share is 4" in await resumed.details()
    assert (await status(gateway)).displaced_sequences == 2
    answer.cancel()


async def test_request_above_its_keys_share_is_refused_while_the_queue_is_full(
    shared: Any, model: Any
) -> None:
    gateway = await shared(max_running_sequences=1, max_queued_sequences=8, max_dialogs=8)
    await leave_streams(gateway, 4, n=2)
    refused = chat(gateway, n=5)
    assert await quotas(refused) == ["max_queued_sequences"]
    assert "8 of 8 sequences run or wait" in await refused.details()
    assert "the key's share is 4" in await refused.details()


async def test_displaced_unary_call_ends_at_once(shared: Any, model: Any) -> None:
    gateway = await shared(max_running_sequences=1, max_queued_sequences=4, max_dialogs=4)
    await leave_streams(gateway, 1)
    waiting = gateway.stub.ChatComplete(ChatCompleteRequest(**fields(n=3)), metadata=by("ann"))
    while (await status(gateway)).queued_sequences < 3:
        pass
    answer = chat(gateway, n=2)
    assert await quotas(waiting) == ["key.share"]
    answer.cancel()
