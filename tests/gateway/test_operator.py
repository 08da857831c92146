"""The status of a gateway in front of scripted replicas."""

import asyncio
import copy
from collections.abc import Callable
from typing import Any

from gateway.replicas.load_reports import FRESH_LOAD_SECONDS
from llama.v1.chat_pb2 import TextCompleteRequest, TextCompleteStreamRequest
from llama.v1.operator_pb2 import (
    UPSTREAM_STATE_CONNECTING,
    UPSTREAM_STATE_REFUSED,
    UPSTREAM_STATE_SERVING,
    GetStatusRequest,
    GetStatusResponse,
)
from llama.v1.sampling_pb2 import FINISH_REASON_STOP

UNREACHABLE = "127.0.0.1:1"


async def status_when(
    gateway: Any, wanted: Callable[[GetStatusResponse], bool]
) -> GetStatusResponse:
    """The first status that is as wanted."""
    while True:
        found: GetStatusResponse = await gateway.operator.GetStatus(GetStatusRequest())
        if wanted(found):
            return found


async def test_status_tells_services_load_and_what_runs(gateway: Any, model: Any) -> None:
    model.load.total_blocks = 64
    call = asyncio.ensure_future(gateway.stub.TextComplete(TextCompleteRequest(prompts=["a", "b"])))
    starts = [await model.starts.get() for _ in range(2)]
    found = await status_when(gateway, lambda each: each.replicas[0].load.total_blocks == 64)
    [replica] = found.replicas
    assert found.tokenizer.state == replica.upstream.state == UPSTREAM_STATE_SERVING
    assert (replica.info.name, replica.upstream.reason) == ("scripted", "")
    assert (replica.running_sequences, found.running_sequences, found.queued_sequences) == (2, 2, 0)
    assert replica.outstanding_tokens > sum(len(start.prompt_ids) for start in starts)
    assert found.uptime.ToTimedelta() > replica.load_age.ToTimedelta()
    for start in starts:
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_STOP)
    await call
    assert (await status_when(gateway, lambda _: True)).running_sequences == 0


async def test_status_tells_the_load_of_now(gateway: Any, model: Any) -> None:
    for running in range(5):
        model.load.running_sequences = running
        [replica] = (await gateway.operator.GetStatus(GetStatusRequest())).replicas
        assert replica.load.running_sequences == running


async def test_status_of_a_replica_that_does_not_answer_is_its_last_report(
    gateway: Any, model: Any
) -> None:
    model.load.running_sequences = 3
    await gateway.operator.GetStatus(GetStatusRequest())
    model.awake.clear()
    [late] = (await gateway.operator.GetStatus(GetStatusRequest())).replicas
    assert late.load.running_sequences == 3
    assert late.load_age.ToTimedelta().total_seconds() >= FRESH_LOAD_SECONDS


async def test_status_tells_why_a_replica_takes_no_work(
    model: Any, start_gateway: Any, start_server: Any, tokenizer_target: str
) -> None:
    other = copy.deepcopy(model.info)
    other.vocab_size -= 1
    unfit, _ = await start_server(type(model)(other).service())
    gateway = await start_gateway(tokenizer_target, unfit, UNREACHABLE)
    found = await status_when(
        gateway,
        lambda each: UPSTREAM_STATE_REFUSED in {one.upstream.state for one in each.replicas},
    )
    upstreams = {replica.upstream.target: replica.upstream for replica in found.replicas}
    assert list(upstreams) == sorted([unfit, UNREACHABLE])
    assert "its embedding has" in upstreams[unfit].reason
    assert upstreams[UNREACHABLE].state == UPSTREAM_STATE_CONNECTING
    assert upstreams[UNREACHABLE].reason
    assert not found.replicas[0].HasField("load")


async def test_status_counts_streams_whose_client_is_away(gateway: Any, model: Any) -> None:
    request = TextCompleteStreamRequest(prompts=["Once"], stream_name="kept")
    call = gateway.stub.TextCompleteStream(request)
    await model.starts.get()
    assert (await status_when(gateway, lambda _: True)).detached_streams == 0
    call.cancel()
    found = await status_when(gateway, lambda each: each.detached_streams == 1)
    assert found.running_sequences == 1
