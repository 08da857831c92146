"""Replicas that die or hang under running streams: every stream ends as if nothing had happened."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import httpx2
import pytest

from llama.v1.chat_pb2 import TextCompleteStreamRequest
from llama.v1.model_pb2 import GetLoadRequest
from llama.v1.model_pb2_grpc import ModelServiceStub
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from tests.e2e.kills import busiest, failovers_of, until_failover
from tests.e2e.streams import Answer, Streams, resumed

pytestmark = pytest.mark.alone

STREAMS = 64
HTTP_STREAMS, HTTP_LENGTH = 32, 400
# Tokens; so many that replicas are still at it when their clients have the first ones.
LENGTH = 300
SHARDED_LENGTH = 220  # on shards a token takes longer
RunFleet = Callable[..., AbstractContextManager[Any]]


def request(number: int, length: int) -> TextCompleteStreamRequest:
    sampling = SamplingParams(ignore_eos=True, max_gen_len=length, temperature=0)
    if number % 2:
        sampling.temperature, sampling.seed = 0.9, number
    prompt = [1, *(3 + (number * 7 + i * 5) % 500 for i in range(8 + number % 16))]
    return TextCompleteStreamRequest(
        prompt_ids=[TokenIds(ids=prompt)], sampling=sampling, logprobs=True
    )


def streams_of(fleet: Any, length: int) -> Streams:
    """All streams at once, half of them greedy and half sampled with a seed."""
    requests = [request(number, length) for number in range(STREAMS)]
    return Streams(fleet.gateway.address, requests)


async def undisturbed(fleet: Any, length: int) -> list[Answer]:
    streams = streams_of(fleet, length)
    await streams.run()
    assert {len(answer.ids) for answer in streams.answers} == {length}
    return streams.answers


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    """Exactly the same tokens and text; the usage is that of one whole answer."""
    assert [each.ids for each in answers] == [each.ids for each in expected]
    assert [each.text for each in answers] == [each.text for each in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        usage = answer.finished.usage
        assert usage.completion_tokens == len(answer.ids)
        assert usage.prompt_tokens == other.finished.usage.prompt_tokens
        times = [usage.queue_time, usage.prefill_time, usage.decode_time]
        assert sum(time.ToNanoseconds() for time in times) <= usage.total_time.ToNanoseconds()


async def assert_all_serve(fleet: Any) -> None:
    """Every replica is seen again, takes work, and holds no block when it is done."""
    await asyncio.to_thread(fleet.wait_for_replicas, len(fleet.models))
    await streams_of(fleet, length=20).run()
    for model in fleet.models:
        async with grpc.aio.insecure_channel(model.address) as channel:
            load = await ModelServiceStub(channel).GetLoad(GetLoadRequest())
        assert load.completion_tokens > 0
        assert (load.running_sequences, load.free_blocks) == (0, load.total_blocks)


@pytest.fixture(scope="module")
def trio(fleet: RunFleet) -> Iterator[tuple[Any, contextlib.ExitStack]]:
    """Three replicas, and the stack on which tests put those that they start again."""
    flags = {"context_length": 512, "replica_hang_timeout": 3}
    with fleet(replicas=3, **flags) as running, contextlib.ExitStack() as back:
        yield running, back


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
async def test_streams_outlive_two_of_three_replicas(trio: Any, end: signal.Signals) -> None:
    running, back = trio

    async def attempt() -> list[Answer]:
        before = failovers_of(running)
        streams = streams_of(running, LENGTH)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(streams.run())
            for number, tokens in enumerate((5, 40)):
                await streams.all_have(tokens)
                running.models[number].send(end)
        assert failovers_of(running) - before == resumed(streams.answers)
        for number in (0, 1):
            if end == signal.SIGKILL:
                running.models[number] = back.enter_context(running.models[number].again())
            else:
                running.models[number].send(signal.SIGCONT)
        await assert_all_serve(running)
        return streams.answers

    expected = await undisturbed(running, LENGTH)
    assert_same(await until_failover(running, attempt), expected)


async def http_answers(fleet: Any) -> list[list[dict[str, Any]]]:
    """The chunks of streams over HTTP, all of them at once."""

    async def chunks(http: httpx2.AsyncClient, number: int) -> list[dict[str, Any]]:
        prompt = [1, *(3 + (number * 7 + i * 5) % 500 for i in range(8 + number % 16))]
        body = {"prompt": prompt, "max_tokens": HTTP_LENGTH, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0.9 * (number % 2), "seed": number, "logprobs": 0}
        answered = await http.post("/v1/completions", json=body)
        *found, done = [line[6:] for line in answered.text.splitlines() if line[:5] == "data:"]
        assert done == "[DONE]"
        return [json.loads(each)["choices"][0] for each in found]

    limits = httpx2.Limits(max_connections=HTTP_STREAMS)
    url = fleet.gateway.http_url
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        return await asyncio.gather(*(chunks(http, number) for number in range(HTTP_STREAMS)))


def told(chunks: list[dict[str, Any]]) -> tuple[str, list[str], str]:
    """The text, the tokens and the finish reason of a stream."""
    tokens = [token for each in chunks if each["logprobs"] for token in each["logprobs"]["tokens"]]
    return "".join(each["text"] for each in chunks), tokens, chunks[-1]["finish_reason"]


async def test_clients_over_http_do_not_notice_that_a_replica_is_killed(trio: Any) -> None:
    running, back = trio
    expected = [*map(told, await http_answers(running))]
    assert {(len(tokens), reason) for _, tokens, reason in expected} == {(HTTP_LENGTH, "length")}

    async def attempt() -> list[Any]:
        async with asyncio.TaskGroup() as tasks:
            disturbed = tasks.create_task(http_answers(running))
            victim = await busiest(running.models, tokens=100)
            await asyncio.to_thread(running.models[victim].kill)
        running.models[victim] = back.enter_context(running.models[victim].again())
        await asyncio.to_thread(running.wait_for_replicas, len(running.models))
        return [*map(told, disturbed.result())]

    assert await until_failover(running, attempt) == expected


async def test_streams_outlive_a_shard_and_its_replica_comes_back(fleet: RunFleet) -> None:
    with fleet(replicas=2, shards=2) as running, contextlib.ExitStack() as back:

        async def attempt() -> list[Answer]:
            before = failovers_of(running)
            streams = streams_of(running, SHARDED_LENGTH)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(streams.run())
                await streams.all_have(5)
                running.models[0].send(signal.SIGKILL, rank=1)
            assert failovers_of(running) - before == resumed(streams.answers)
            assert await asyncio.to_thread(running.models[0].wait) == 1
            running.models[0] = back.enter_context(running.models[0].again())
            await assert_all_serve(running)
            return streams.answers

        expected = await undisturbed(running, SHARDED_LENGTH)
        assert_same(await until_failover(running, attempt, sequences=STREAMS // 4), expected)
