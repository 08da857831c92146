"""The gateway between real clients, a real tokenizer service and scripted replicas."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo

from llama.v1.chat_pb2 import (
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    GetModelRequest,
    StreamEvent,
    TextCompleteRequest,
)
from llama.v1.model_pb2 import SequenceError, Timings
from llama.v1.sampling_pb2 import (
    DETERMINISM_SEEDED,
    FINISH_REASON_CONTEXT_LENGTH,
    FINISH_REASON_LENGTH,
    FINISH_REASON_SPECIAL_TAGS,
    FINISH_REASON_STOP,
    FINISH_REASON_STOP_STRING,
    SamplingParams,
)
from tests.error_details import details
from tests.gateway.messages import dialog
from tokenizer_service.server import tokenizer_service
from tokenizer_service.tokenizer import Tokenizer

EOS = 2


async def test_events_are_numbered_and_in_order(
    gateway: Any, model: Any, tokenizer: Tokenizer
) -> None:
    request = ChatCompleteStreamRequest(dialogs=[dialog(), dialog("[INST]"), dialog()])
    call = gateway.stub.ChatCompleteStream(request)
    sequences = [(await model.starts.get()).sequence_id for _ in range(2)]
    grass, leaves = (tokenizer.encode(text, bos=False, eos=False) for text in ("grass", "leaves"))
    model.tell(sequences[1], ids=leaves)
    model.tell(sequences[0], ids=grass, finish_reason=FINISH_REASON_STOP)
    model.tell(sequences[1], finish_reason=FINISH_REASON_LENGTH)
    events = [response.event async for response in call]
    assert [event.event_number for event in events] == list(range(1, len(events) + 1))
    assert [described(event) for event in events] == [
        ("started", 0, ""),
        ("started", 1, ""),
        ("delta", 1, "Error: special tags are not allowed as part of the prompt."),
        ("finished", 1, FINISH_REASON_SPECIAL_TAGS),
        ("started", 2, ""),
        ("delta", 2, "leaves"),
        ("delta", 0, "grass"),
        ("finished", 0, FINISH_REASON_STOP),
        ("finished", 2, FINISH_REASON_CONTEXT_LENGTH),  # no max_gen_len was asked for
    ]


def described(event: StreamEvent) -> tuple[str, int, Any]:
    match event.WhichOneof("kind"):
        case "started":
            return "started", event.started.index, ""
        case "delta":
            return "delta", event.delta.index, event.delta.text
    return "finished", event.finished.index, event.finished.finish_reason


async def test_unary_answer_folds_the_events(
    gateway: Any, model: Any, tokenizer: Tokenizer
) -> None:
    request = ChatCompleteRequest(dialogs=[dialog()], sampling=SamplingParams(seed=7))
    call = asyncio.ensure_future(gateway.stub.ChatComplete(request))
    start = await model.starts.get()
    for token_id in tokenizer.encode("grass and leaves", bos=False, eos=False):
        model.tell(start.sequence_id, ids=[token_id])
    timings = Timings()
    timings.prefill.FromMilliseconds(30)
    model.tell(
        start.sequence_id,
        finish_reason=FINISH_REASON_STOP,
        timings=timings,
        cached_prompt_tokens=3,
    )
    [prediction] = (await call).predictions
    assert prediction.text == "grass and leaves"
    assert (prediction.sampling.seed, prediction.fingerprint) == (7, "weights")
    assert prediction.determinism == DETERMINISM_SEEDED
    assert prediction.usage.prompt_tokens == len(start.prompt_ids)
    assert prediction.usage.cached_prompt_tokens == 3
    assert prediction.usage.prefill_time.ToMilliseconds() == 30
    assert prediction.usage.total_time.ToNanoseconds() > 0


async def test_sequence_is_started_with_what_the_request_means(gateway: Any, model: Any) -> None:
    sampling = SamplingParams(max_gen_len=300, top_p=0.5, stop=["x"])
    request = ChatCompleteStreamRequest(dialogs=[dialog()], sampling=sampling)
    call = gateway.stub.ChatCompleteStream(request)
    start = await model.starts.get()
    started = (await call.read()).event.started
    call.cancel()
    assert start.sampling.max_gen_len == 256 - len(start.prompt_ids)
    assert start.sampling.seed == started.sampling.seed
    assert (start.sampling.top_p, start.sampling.temperature) == pytest.approx((0.5, 0.6))
    assert not start.sampling.stop
    assert list(start.eos_ids) == [EOS]


async def test_drawn_seeds_differ_and_a_given_one_is_for_all(gateway: Any, model: Any) -> None:
    dialogs = [dialog()] * 2
    seeds = []
    for sampling in (SamplingParams(), SamplingParams(seed=2**64 - 1)):
        request = ChatCompleteStreamRequest(dialogs=dialogs, sampling=sampling)
        call = gateway.stub.ChatCompleteStream(request)
        seeds += [(await model.starts.get()).sampling.seed for _ in dialogs]
        call.cancel()
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [2**64 - 1] * 2


async def test_stop_string_cancels_the_sequence_and_still_tells_its_usage(
    gateway: Any, model: Any, tokenizer: Tokenizer
) -> None:
    request = TextCompleteRequest(prompts=["one"], sampling=SamplingParams(stop=["two"]))
    call = asyncio.ensure_future(gateway.stub.TextComplete(request))
    start = await model.starts.get()
    ids = tokenizer.encode("one two three", bos=False, eos=False)
    model.tell(start.sequence_id, ids=ids)
    [prediction] = (await call).predictions
    assert await model.cancels.get() == start.sequence_id
    assert (prediction.text, prediction.finish_reason) == ("one ", FINISH_REASON_STOP_STRING)
    assert 0 < prediction.usage.completion_tokens < len(ids)


@pytest.mark.parametrize("method", ["ChatComplete", "ChatCompleteStream"])
async def test_client_that_goes_away_cancels_its_sequences(
    gateway: Any, model: Any, method: str
) -> None:
    kind = ChatCompleteRequest if method == "ChatComplete" else ChatCompleteStreamRequest
    call = getattr(gateway.stub, method)(kind(dialogs=[dialog()] * 3))
    started = {(await model.starts.get()).sequence_id for _ in range(3)}
    call.cancel()
    assert {await model.cancels.get() for _ in range(3)} == started


@pytest.mark.parametrize("method", ["ChatComplete", "ChatCompleteStream"])
async def test_deadline_that_passes_cancels_the_sequence(
    gateway: Any, model: Any, method: str
) -> None:
    kind = ChatCompleteRequest if method == "ChatComplete" else ChatCompleteStreamRequest
    call = getattr(gateway.stub, method)(kind(dialogs=[dialog()]), timeout=2)
    start = await model.starts.get()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await model.cancels.get() == start.sequence_id


async def test_failed_sequence_ends_the_call_and_cancels_its_neighbours(
    gateway: Any, model: Any
) -> None:
    call = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()] * 2))
    first, second = [(await model.starts.get()).sequence_id for _ in range(2)]
    error = SequenceError(code=grpc.StatusCode.INTERNAL.value[0], message="logits not finite")
    model.tell(first, error=error)
    with pytest.raises(grpc.aio.AioRpcError, match="logits not finite") as failed:
        await call
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert await model.cancels.get() == second


async def test_full_queue_refuses_at_once_and_takes_again_after_an_end(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_queued_sequences=2, max_dialogs=2)
    await gateway.until(serving=True)
    request = ChatCompleteRequest(dialogs=[dialog()])
    # Nothing promises that two calls reach the replica in the order in which they were made, so
    # the second waits until the first is there.
    running, ids = [], []
    for _ in range(2):
        running.append(gateway.stub.ChatComplete(request))
        ids.append((await model.starts.get()).sequence_id)
    with pytest.raises(grpc.aio.AioRpcError, match="the queue is full: 2 of 2") as refused:
        await gateway.stub.ChatComplete(request)
    retry, quota = details(refused.value)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert retry.retry_delay.ToMilliseconds() == 1000
    assert quota.violations[0].subject == "max_queued_sequences"
    model.tell(ids[0], finish_reason=FINISH_REASON_STOP)
    await running[0]
    accepted = gateway.stub.ChatComplete(request)
    assert (await model.starts.get()).sequence_id not in ids
    accepted.cancel()


@pytest.mark.parametrize("missing", ["tokenizer", "model"])
async def test_nothing_is_served_until_tokenizer_and_replica_are_there(
    start_gateway: Any, start_server: Any, tokenizer: Tokenizer, model: Any, missing: str
) -> None:
    services = {"tokenizer": tokenizer_service(tokenizer), "model": model.service()}
    targets = {name: await start_server(service) for name, service in services.items()}
    address, server = targets[missing]
    await server.aclose()
    gateway = await start_gateway(targets["tokenizer"][0], targets["model"][0])
    await gateway.until(serving=False)
    with pytest.raises(grpc.aio.AioRpcError, match="available") as refused:
        await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog()]))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(details(refused.value)[0], RetryInfo)
    await start_server(services[missing], port=int(address.rpartition(":")[2]))
    await gateway.until(serving=True)


async def test_sequences_go_to_the_replica_with_the_least_outstanding_tokens(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any, model_info: Any
) -> None:
    other = type(model)(model_info)
    targets = [(await start_server(each.service()))[0] for each in (model, other)]
    gateway = await start_gateway(tokenizer_target, *targets)
    await gateway.until(serving=True)
    while (await gateway.stub.GetModel(GetModelRequest())).replicas < 2:
        pass  # the second session is about to begin
    for length, chosen in ((100, model), (30, other), (90, other), (50, model)):
        sampling = SamplingParams(max_gen_len=length)
        request = ChatCompleteStreamRequest(dialogs=[dialog("a")], sampling=sampling)
        call = gateway.stub.ChatCompleteStream(request)
        start = await chosen.starts.get()
        assert start.sampling.max_gen_len == length
        await call.read()


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ({"tokenizer_fingerprint": "f" * 64}, "was given the tokenizer ffffffffffff"),
        ({"vocab_size": 32000}, "its embedding has 32000 rows, the tokenizer service has 560"),
        ({"fingerprint": "other"}, "serves scripted (fingerprint other, context length 256, "),
        ({"context_length": 4096}, "context length 4096, float32 on cpu"),
    ],
)
async def test_replica_that_does_not_fit_is_refused_and_said_why(
    start_gateway: Any,
    start_server: Any,
    tokenizer_target: str,
    model: Any,
    log: Any,
    difference: dict[str, Any],
    reason: str,
) -> None:
    address, _ = await start_server(model.service())
    unfit = type(model)(type(model.info)())
    unfit.info.MergeFrom(model.info)
    unfit.info.MergeFrom(type(model.info)(**difference))
    late, server = await start_server(unfit.service())
    await server.aclose()
    gateway = await start_gateway(tokenizer_target, address, late)
    await gateway.until(serving=True)
    await start_server(unfit.service(), port=int(late.rpartition(":")[2]))
    refusal = await log.wait_for("upstream unusable")
    assert refusal["upstream"] == late
    assert reason in refusal["reason"]
    assert (await gateway.stub.GetModel(GetModelRequest())).replicas == 1
