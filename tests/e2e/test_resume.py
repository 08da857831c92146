"""Streams of the clients over connections that break and gateways that die."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from client import AsyncClient, Client, Delta, Event, Started, StreamLostError, TextOptions
from llama.v1.model_pb2 import GetLoadRequest
from tests.e2e.proxy import Proxy, proxied

pytestmark = pytest.mark.alone

LONG: TextOptions = {"max_gen_len": 240, "ignore_eos": True, "logprobs": True}
GREEDY: TextOptions = {**LONG, "temperature": 0}
STREAMS = 31  # and one more
ATTEMPTS = 6


@pytest.fixture
async def proxy(stack: Any) -> AsyncIterator[Proxy]:
    """In front of the shared gateway."""
    async with proxied(stack.gateway.address) as proxy:
        yield proxy


async def test_named_streams_that_are_left_leave_nothing_behind(
    stack: Any, model_service: Any
) -> None:
    async def leave(client: AsyncClient, number: int) -> None:
        events = 0
        async with aclosing(client.complete_stream(f"Stream {number}", **LONG)) as stream:
            async for _event in stream:
                events += 1
                if events > number % 7:  # some while they wait, some in the middle
                    break

    async with AsyncClient(stack.gateway.address) as client:
        await asyncio.gather(*(leave(client, number) for number in range(100)))
        load = await model_service.GetLoad(GetLoadRequest())
        while load.running_sequences or load.waiting_sequences:
            load = await model_service.GetLoad(GetLoadRequest())
    assert (load.free_blocks, load.outstanding_tokens) == (load.total_blocks, 0)


@dataclass
class Followed:
    """The part of a stream that its reader saw."""

    seed: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    deltas: int = 0


async def follow(
    client: AsyncClient, prompt: str, at_delta: Callable[[Followed], None], **options: Any
) -> Followed:
    seen = Followed()
    async with aclosing(client.complete_stream(prompt, **LONG, **options)) as events:
        async for event in events:
            match event:
                case Started():
                    seen.seed = event.seed
                case Delta():
                    seen.ids += [token.id for token in event.tokens]
                    seen.text += event.text
                    seen.deltas += 1
                    at_delta(seen)
    return seen


async def undisturbed(client: AsyncClient, prompt: str, **options: Any) -> tuple[list[int], str]:
    prediction = await client.complete(prompt, **LONG, **options)
    return [token.id for token in prediction.tokens], prediction.text


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 3}])
async def test_stream_goes_on_exactly_where_its_connection_was_cut(
    proxy: Proxy, options: dict[str, Any]
) -> None:
    def cut(seen: Followed) -> None:
        if seen.deltas in (3, 40):
            proxy.cut()

    for _ in range(ATTEMPTS):
        before = proxy.connections
        async with AsyncClient(proxy.address) as client:
            seen = await follow(client, "The", cut, **options)
            was_cut = proxy.connections - before > 1
            assert (seen.ids, seen.text) == await undisturbed(client, "The", **options)
        if was_cut:
            return
    pytest.fail("every stream had arrived whole before its connection was cut")


async def test_synchronous_stream_goes_on_where_its_connection_was_cut(proxy: Proxy) -> None:
    loop = asyncio.get_running_loop()

    def read(client: Client) -> str:
        text = ""
        for event in client.complete_stream("The", **GREEDY):
            if isinstance(event, Delta):
                if not text:
                    asyncio.run_coroutine_threadsafe(_cut(proxy), loop).result()
                text += event.text
        return text

    for _ in range(ATTEMPTS):
        before = proxy.connections
        with Client(proxy.address) as client:
            text = await asyncio.to_thread(read, client)
            was_cut = proxy.connections - before > 1
            assert text == (await asyncio.to_thread(client.complete, "The", **GREEDY)).text
        if was_cut:
            return
    pytest.fail("every stream had arrived whole before its connection was cut")


async def _cut(proxy: Proxy) -> None:
    proxy.cut()


def choice(number: int) -> dict[str, Any]:
    """Greedy, with a seed of ours, or with one that the gateway draws."""
    return [{"temperature": 0}, {"temperature": 1, "seed": number}, {"temperature": 1}][number % 3]


async def follow_all(client: AsyncClient) -> list["asyncio.Task[Followed]"]:
    """Streams with a reader each; all have some of their tokens, and not all have ended."""
    begun, all_begun = set[int](), asyncio.Event()

    def run(number: int) -> "asyncio.Task[Followed]":
        def on_delta(_seen: Followed) -> None:
            begun.add(number)
            if len(begun) == STREAMS:
                all_begun.set()

        return asyncio.create_task(follow(client, f"Stream {number}", on_delta, **choice(number)))

    for _ in range(ATTEMPTS):
        streams = [run(number) for number in range(STREAMS)]
        await all_begun.wait()
        if not all(stream.done() for stream in streams):
            return streams
        begun.clear()
        all_begun.clear()
    raise AssertionError("every stream had ended when the last of them began")


async def begin_two_prompts(client: AsyncClient) -> AsyncGenerator[Event, None]:
    """One more stream, whose answers draw with a seed each; it has begun."""
    stream = client.complete_stream_many(["One", "Two"], **LONG)
    assert isinstance(await anext(stream), Started)
    return stream


async def test_streams_outlive_a_killed_gateway_without_losing_or_doubling_a_token(
    own_gateway: Any,
) -> None:
    async with AsyncClient(own_gateway.address) as client:
        streams = await follow_all(client)
        unrepeatable = await begin_two_prompts(client)
        own_gateway.kill()
        with own_gateway.again():
            seen = await asyncio.gather(*streams)
            with pytest.raises(StreamLostError, match="can only be repeated if"):
                [event async for event in unrepeatable]
            expected = await asyncio.gather(
                *(
                    undisturbed(client, f"Stream {number}", **{**choice(number), "seed": each.seed})
                    for number, each in enumerate(seen)
                )
            )
            assert [(each.ids, each.text) for each in seen] == expected
