"""The leader's servicer over real gRPC, its server and engine thread in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from llama.v1 import model_pb2, model_pb2_grpc, sampling_pb2
from model_service.loading.distributed import Shards
from model_service.loading.load_replica import load_replica
from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.kernels import without_kernels
from model_service.rank import replica_options
from model_service.server import model_service
from model_service.settings import ModelSettings
from serving.server import Service, channel, running
from serving.settings import ServerSettings

Case = dict[str, Any]
INVALID_ARGUMENT, ALREADY_EXISTS, UNAVAILABLE = 3, 6, 14


class Model:
    """A stub on a running server; `open` starts a Generate stream."""

    def __init__(self, target: grpc.aio.Channel) -> None:
        self.stub = model_pb2_grpc.ModelServiceStub(target)

    async def open(self, *requests: model_pb2.GenerateRequest) -> Any:
        call = self.stub.Generate()
        for request in requests:
            await call.write(request)
        return call

    async def finish(self, *requests: model_pb2.GenerateRequest) -> dict[str, list[Any]]:
        """Events by request id, of a stream that sends these requests and no more."""
        call = await self.open(*requests)
        await call.done_writing()
        events: dict[str, list[Any]] = {}
        async for response in call:
            for event in response.events:
                events.setdefault(event.sequence_id, []).append(event)
        return events

    async def until_idle(self) -> model_pb2.GetLoadResponse:
        """The first load report without a sequence."""
        async with asyncio.timeout(30):
            while True:
                load = await self.stub.GetLoad(model_pb2.GetLoadRequest())
                if not load.running_sequences + load.waiting_sequences:
                    return load


def start(case: Case, sequence_id: str = "a", **changes: Any) -> model_pb2.GenerateRequest:
    fields = {
        "prompt_ids": case["prompt_ids"],
        "sampling": sampling_pb2.SamplingParams(temperature=0, max_gen_len=32),
        "eos_ids": [2],
        "logprobs": True,
    }
    sequence = model_pb2.StartSequence(sequence_id=sequence_id, **(fields | changes))
    return model_pb2.GenerateRequest(start=sequence)


def endless(case: Case, sequence_id: str) -> model_pb2.GenerateRequest:
    sampling = sampling_pb2.SamplingParams(temperature=0, ignore_eos=True)
    return start(case, sequence_id, sampling=sampling)


def ids(events: list[Any]) -> list[int]:
    return [token for event in events for token in event.ids]


@pytest.fixture
async def service(golden: Path) -> Service:
    settings = ModelSettings(ckpt_dir=golden / "checkpoints" / "gqa-mp1", max_seq_len=256)
    return model_service(load_replica(replica_options(settings)), "of-the-tokenizer", Shards(60))


@pytest.fixture
async def model(service: Service) -> AsyncIterator[Model]:
    async with running(ServerSettings(), service) as server, channel(server.address) as target:
        yield Model(target)


async def test_requests_share_a_stream(model: Model, cases: Callable[[str], list[Case]]) -> None:
    chosen = cases("gqa")[:12]
    events = await model.finish(*(start(case, case["id"]) for case in chosen))
    for case in chosen:
        assert ids(events[case["id"]]) == case["ids"][:32]
        assert events[case["id"]][-1].finish_reason != 0
        assert events[case["id"]][-1].timings.compute.ToNanoseconds() > 0


async def test_equal_sequence_ids_on_two_streams_do_not_meet(
    model: Model, cases: Callable[[str], list[Case]]
) -> None:
    first, second = cases("gqa")[:2]
    answers = await asyncio.gather(model.finish(start(first)), model.finish(start(second)))
    assert [ids(answer["a"]) for answer in answers] == [first["ids"], second["ids"]]


async def test_a_cancelled_sequence_frees_its_blocks(
    model: Model, cases: Callable[[str], list[Case]]
) -> None:
    call = await model.open(endless(cases("gqa")[0], "a"))
    await call.read()
    cancel = model_pb2.CancelSequence(sequence_id="a")
    await call.write(model_pb2.GenerateRequest(cancel=cancel))
    reason = 0
    while not reason:
        reason = (await call.read()).events[0].finish_reason
    assert reason == sampling_pb2.FINISH_REASON_CANCELLED
    load = await model.until_idle()
    assert load.free_blocks == load.total_blocks > 0


async def test_a_caller_that_goes_away_takes_its_sequences_along(
    model: Model, cases: Callable[[str], list[Case]]
) -> None:
    call = await model.open(*(endless(cases("gqa")[0], str(i)) for i in range(12)))
    await call.read()
    call.cancel()
    load = await model.until_idle()
    assert load.free_blocks == load.total_blocks


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_a_named_stop_token_ends_the_answer_before_itself(
    model: Model, cases: Callable[[str], list[Case]], ignore_eos: bool
) -> None:
    case = cases("gqa")[0]
    stop = case["ids"][5]
    sampling = sampling_pb2.SamplingParams(
        temperature=0, max_gen_len=32, ignore_eos=ignore_eos, stop_token_ids=[559, stop]
    )
    events = (await model.finish(start(case, sampling=sampling)))["a"]
    assert ids(events) == case["ids"][: case["ids"].index(stop)]
    assert events[-1].finish_reason == sampling_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sequence_id": ""}, "start.sequence_id"),
        ({"prompt_ids": []}, "prompt_ids: must not be empty"),
        (
            {"prompt_ids": [560]},
            "prompt_ids[0]: must be less than the vocabulary size, 560, not 560",
        ),
        ({"prompt_ids": [1] * 257}, "prompt_ids: the prompt has 257 tokens"),
        ({"top_logprobs": 21}, "start.top_logprobs"),
        ({"sampling": {"temperature": float("nan")}}, "start.sampling.temperature"),
        ({"sampling": {"temperature": 0.5}}, "start.sampling.seed"),
        ({"sampling": {"temperature": 0, "top_p": 1.5}}, "start.sampling.top_p"),
        ({"sampling": {"temperature": 0, "min_p": -0.1}}, "start.sampling.min_p"),
        ({"sampling": {"temperature": 0, "logit_bias": {560: 1.0}}}, "start.sampling.logit_bias"),
        (
            {"sampling": {"temperature": 0, "stop_token_ids": [1, 560]}},
            "start.sampling.stop_token_ids",
        ),
    ],
)
async def test_a_bad_start_fails_alone(
    model: Model,
    cases: Callable[[str], list[Case]],
    changes: dict[str, Any],
    field: str,
) -> None:
    good, other = cases("gqa")[:2]
    bad = start(other, **({"sequence_id": "bad"} | changes))
    events = await model.finish(start(good, "good"), bad)
    assert ids(events.pop("good")) == good["ids"]
    ((event,),) = events.values()
    assert event.error.code == INVALID_ARGUMENT
    assert field in event.error.message


async def test_a_sequence_id_that_runs_is_refused_and_runs_on(
    model: Model, cases: Callable[[str], list[Case]]
) -> None:
    case = cases("gqa")[0]
    events = await model.finish(start(case), start(case))
    (refusal,) = [event for event in events["a"] if event.error.code]
    assert refusal.error.code == ALREADY_EXISTS
    assert ids(events["a"]) == case["ids"]


async def test_draining_finishes_what_runs_and_refuses_what_comes(
    model: Model, service: Service, cases: Callable[[str], list[Case]]
) -> None:
    call = await model.open(start(cases("gqa")[0], "running"))
    events = list((await call.read()).events)
    assert service.drain is not None
    drained = asyncio.ensure_future(service.drain())
    await call.write(start(cases("gqa")[0], "late"))
    while (response := await call.read()) is not grpc.aio.EOF:
        events += response.events
    await drained
    assert ids([e for e in events if e.sequence_id == "running"]) == cases("gqa")[0]["ids"]
    late = [e for e in events if e.sequence_id == "late"]
    assert all(event.error.code == UNAVAILABLE for event in late)


async def test_load_counts_what_was_computed_found_and_made(
    model: Model, cases: Callable[[str], list[Case]]
) -> None:
    case = cases("gqa")[0]
    last = [(await model.finish(start(case)))["a"][-1] for _ in range(2)]
    load = await model.until_idle()
    found = len(case["prompt_ids"]) - 1
    assert [event.cached_prompt_tokens for event in last] == [0, found]
    assert load.cached_prompt_tokens == found > 0
    assert load.prompt_tokens == 2 * len(case["prompt_ids"]) - found
    assert load.completion_tokens == 2 * len(case["ids"])
    assert 0 < load.cached_blocks < load.free_blocks == load.total_blocks


async def test_model_info_says_what_was_loaded(model: Model) -> None:
    info = await model.stub.GetModelInfo(model_pb2.GetModelInfoRequest())
    assert (info.name, info.parameters, info.vocab_size) == ("gqa-mp1", 238016, 560)
    assert (info.context_length, info.shards, info.dtype) == (256, 1, "float32")
    assert info.tokenizer_fingerprint == "of-the-tokenizer"
    assert len(info.fingerprint) == 16
    invariant, seeded = "DETERMINISM_BATCH_INVARIANT", "DETERMINISM_SEEDED"
    expected = seeded if without_kernels() else invariant
    assert sampling_pb2.Determinism.Name(info.determinism) == expected
    assert info.device == f"cpu ({instructions()})"
