"""Generations whose replica is lost: what the gateway asks of the next one, what clients see."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status.rpc_status import from_call

from gateway.generation.generation import MAX_RESTARTS
from llama.v1.chat_pb2 import (
    GetModelRequest,
    Prediction,
    TextCompleteRequest,
    TextCompleteStreamRequest,
    Token,
)
from llama.v1.model_pb2 import SequenceError, Timings
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH, SamplingParams, TokenIds
from tokenizer_service.tokenizer import Tokenizer

PROMPT = [1, 5, 6, 7]
SEEDED = SamplingParams(seed=11, max_gen_len=20)


@dataclass
class Fleet:
    """A gateway in front of scripted replicas, each with what ends its server."""

    gateway: Any
    models: list[Any]
    servers: list[tuple[str, AsyncExitStack]]

    async def kill(self, number: int) -> None:
        await self.servers[number][1].aclose()

    async def first_start(self) -> tuple[int, Any]:
        """Which replica is asked first, and for what."""
        tasks = [asyncio.create_task(model.starts.get()) for model in self.models]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        [first] = done
        return tasks.index(first), first.result()


@pytest.fixture
def start_fleet(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any, model_info: Any
) -> Any:
    async def start(size: int = 2, **settings: Any) -> Fleet:
        models = [type(model)(model_info) for _ in range(size)]
        servers = [await start_server(each.service()) for each in models]
        targets = [address for address, _ in servers]
        gateway = await start_gateway(tokenizer_target, *targets, **settings)
        await gateway.until(serving=True)
        while (await gateway.stub.GetModel(GetModelRequest())).replicas < size:
            pass  # the others' sessions are about to begin
        return Fleet(gateway, models, servers)

    return start


def complete(fleet: Fleet, **fields: Any) -> "asyncio.Future[Any]":
    """A running completion of one prompt."""
    fields = {"sampling": SEEDED, **fields}
    request = TextCompleteRequest(prompt_ids=[TokenIds(ids=PROMPT)], **fields)
    call: asyncio.Future[Any] = asyncio.ensure_future(fleet.gateway.stub.TextComplete(request))
    return call


def stream(fleet: Fleet, **fields: Any) -> Any:
    """A running stream of one prompt's completion."""
    request = TextCompleteStreamRequest(
        prompt_ids=[TokenIds(ids=PROMPT)], sampling=SEEDED, **fields
    )
    return fleet.gateway.stub.TextCompleteStream(request)


async def first_tokens(call: Any) -> list[Token]:
    """Those of the first delta: what the replica made has arrived here."""
    while not (event := (await call.read()).event).HasField("delta"):
        pass
    return list(event.delta.tokens)


async def only(call: "asyncio.Future[Any]") -> Prediction:
    prediction: Prediction
    [prediction] = (await call).predictions
    return prediction


async def test_answer_goes_on_at_another_replica_from_where_it_was(
    start_fleet: Any, tokenizer: Tokenizer
) -> None:
    fleet = await start_fleet()
    call = stream(fleet, logprobs=True)
    first, start = await fleet.first_start()
    ids = tokenizer.encode("grass and leaves", bos=False, eos=False)
    fleet.models[first].tell(
        start.sequence_id, ids=ids[:2], logprobs=[-1, -2], cached_prompt_tokens=3
    )
    tokens = await first_tokens(call)
    await fleet.kill(first)
    again = await fleet.models[1 - first].starts.get()
    rest = ids[2:]
    fleet.models[1 - first].tell(
        again.sequence_id, ids=rest, logprobs=[-3] * len(rest), finish_reason=FINISH_REASON_LENGTH
    )
    tokens += await first_tokens(call)
    last = (await call.read()).event.finished
    assert (list(again.prompt_ids), again.generated_tokens) == ([*PROMPT, *ids[:2]], 2)
    assert again.sampling == start.sampling
    assert [token.id for token in tokens] == ids
    assert [token.logprob for token in tokens] == [-1, -2, *[-3] * len(rest)]
    usage = last.usage
    assert last.failovers == 1
    assert (usage.prompt_tokens, usage.cached_prompt_tokens) == (len(PROMPT), 3)
    assert usage.completion_tokens == len(ids)


async def test_logprobs_of_the_prompt_are_asked_for_until_they_came(start_fleet: Any) -> None:
    fleet = await start_fleet(size=3)
    call = stream(fleet, logprobs=True, echo=True)
    first, start = await fleet.first_start()
    await fleet.kill(first)
    second, again = await fleet.first_start()
    fleet.models[second].tell(again.sequence_id, ids=[*PROMPT, 8], logprobs=[0, -1, -2, -3, -4])
    tokens = await first_tokens(call)
    await fleet.kill(second)
    third, last = await fleet.first_start()
    fleet.models[third].tell(last.sequence_id, finish_reason=FINISH_REASON_LENGTH)
    end = (await call.read()).event.finished
    assert [each.prompt_logprobs for each in (start, again, last)] == [True, True, False]
    assert [each.generated_tokens for each in (start, again, last)] == [0, 0, 1]
    assert [token.id for token in tokens] == [*PROMPT, 8]
    assert (end.usage.completion_tokens, end.failovers) == (1, 2)


async def test_a_replica_that_drains_passes_new_sequences_on(start_fleet: Any) -> None:
    fleet = await start_fleet()
    call = complete(fleet)
    first, start = await fleet.first_start()
    draining = SequenceError(code=grpc.StatusCode.UNAVAILABLE.value[0], message="draining")
    fleet.models[first].tell(start.sequence_id, error=draining)
    again = await fleet.models[1 - first].starts.get()
    fleet.models[1 - first].tell(again.sequence_id, finish_reason=FINISH_REASON_LENGTH)
    assert (await only(call)).failovers == 0


async def test_a_fault_of_the_sequence_itself_is_not_tried_elsewhere(start_fleet: Any) -> None:
    fleet = await start_fleet()
    call = complete(fleet)
    first, start = await fleet.first_start()
    fault = SequenceError(code=grpc.StatusCode.INTERNAL.value[0], message="not finite")
    fleet.models[first].tell(start.sequence_id, error=fault)
    with pytest.raises(grpc.aio.AioRpcError, match="not finite"):
        await call
    assert fleet.models[1 - first].starts.empty()


async def test_an_answer_waits_for_its_only_replica_to_come_back(
    start_fleet: Any, start_server: Any
) -> None:
    fleet = await start_fleet(size=1)
    call = complete(fleet)
    [model] = fleet.models
    await model.starts.get()
    await fleet.kill(0)
    await fleet.gateway.until(serving=False)
    await start_server(model.service(), port=int(fleet.servers[0][0].rpartition(":")[2]))
    again = await model.starts.get()
    model.tell(again.sequence_id, ids=[8], finish_reason=FINISH_REASON_LENGTH, timings=Timings())
    prediction = await only(call)
    assert prediction.failovers == 1
    assert (
        0
        < prediction.usage.queue_time.ToNanoseconds()
        < prediction.usage.total_time.ToNanoseconds()
    )


async def test_without_another_replica_an_answer_ends_as_unavailable(start_fleet: Any) -> None:
    fleet = await start_fleet(size=1, failover_timeout=0.1)
    call = complete(fleet)
    await fleet.models[0].starts.get()
    await fleet.kill(0)
    with pytest.raises(grpc.aio.AioRpcError, match=r"ready within 0\.1 s") as lost:
        await call
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    status = from_call(lost.value)  # type: ignore[arg-type]  # made for grpc.Call, works as well
    assert status is not None
    assert status.details[0].Is(RetryInfo.DESCRIPTOR)


async def test_a_sequence_that_its_replicas_die_of_is_given_up(
    start_fleet: Any, start_server: Any
) -> None:
    fleet = await start_fleet(size=1)
    call = complete(fleet)
    [model] = fleet.models
    port = int(fleet.servers[0][0].rpartition(":")[2])
    for _ in range(MAX_RESTARTS):
        await model.starts.get()
        await fleet.kill(0)
        fleet.servers = [await start_server(model.service(), port=port)]
    await model.starts.get()
    await fleet.kill(0)
    with pytest.raises(grpc.aio.AioRpcError, match=f"gave up after {MAX_RESTARTS + 1} attempts"):
        await call


async def test_a_call_cancelled_while_it_waits_for_a_replica_is_begun_nowhere(
    start_fleet: Any, start_server: Any
) -> None:
    fleet = await start_fleet(size=1)
    [model] = fleet.models
    call = stream(fleet)
    await model.starts.get()
    await fleet.kill(0)
    await fleet.gateway.until(serving=False)
    call.cancel()
    await start_server(model.service(), port=int(fleet.servers[0][0].rpartition(":")[2]))
    await fleet.gateway.until(serving=True)
    later = complete(fleet, sampling=SamplingParams(seed=99))
    assert (await model.starts.get()).sampling.seed == 99
    assert model.starts.empty()
    later.cancel()


async def test_a_replica_that_does_not_answer_loses_its_sequences(
    start_fleet: Any, log: Any
) -> None:
    fleet = await start_fleet(replica_hang_timeout=1.0)
    call = complete(fleet)
    first, _ = await fleet.first_start()
    fleet.models[first].awake.clear()
    again = await fleet.models[1 - first].starts.get()
    fleet.models[1 - first].tell(again.sequence_id, finish_reason=FINISH_REASON_LENGTH)
    assert (await only(call)).failovers == 1
    unusable = await log.wait_for("upstream unusable")
    assert unusable["reason"] == "it hangs: no answer within 1 seconds"


async def test_a_replica_that_makes_no_step_loses_its_sequences(start_fleet: Any, log: Any) -> None:
    fleet = await start_fleet(replica_hang_timeout=3.0)
    call = complete(fleet)
    first, _ = await fleet.first_start()
    fleet.models[first].steps = False
    again = await fleet.models[1 - first].starts.get()
    fleet.models[1 - first].tell(again.sequence_id, finish_reason=FINISH_REASON_LENGTH)
    assert (await only(call)).failovers == 1
    assert "no step within 9 seconds" in (await log.wait_for("upstream unusable"))["reason"]
