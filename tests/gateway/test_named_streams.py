"""Named streams: what a client that lost its connection finds when it comes back."""

import asyncio
import gc
import tracemalloc
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.rpc.named_streams import EVENT_OVERHEAD, STREAM_OVERHEAD, NamedStreams, StreamLimits
from llama.v1.chat_pb2 import (
    ROLE_USER,
    CancelStreamRequest,
    ChatCompleteStreamRequest,
    Delta,
    Dialog,
    Message,
    ResumeStreamRequest,
    StreamEvent,
    TextCompleteStreamRequest,
    Token,
)
from llama.v1.sampling_pb2 import FINISH_REASON_CONTEXT_LENGTH, FINISH_REASON_LENGTH, SamplingParams
from serving.errors import RequestError
from serving.security import caller
from tokenizer_service.tokenizer import Tokenizer

TEXT = "One by one the runners of the high road hand over what they carry, day and night."


def request(name: str = "", **fields: Any) -> TextCompleteStreamRequest:
    sampling = SamplingParams(seed=7)
    return TextCompleteStreamRequest(
        prompts=["Once"], stream_name=name, sampling=sampling, logprobs=True, **fields
    )


def resume(gateway: Any, name: str, after: int) -> Any:
    return gateway.stub.ResumeStream(
        ResumeStreamRequest(stream_name=name, after_event_number=after)
    )


def tell(model: Any, start: Any, ids: Sequence[int], *, end: bool = False) -> None:
    """Makes tokens, one at a time."""
    for token_id in ids:
        model.tell(start.sequence_id, ids=[token_id], logprobs=[-1.0])
    if end:
        model.tell(start.sequence_id, finish_reason=FINISH_REASON_LENGTH)


async def read(call: Any, count: int) -> list[StreamEvent]:
    """The next events of either kind of call, fewer at its end."""
    events: list[StreamEvent] = []
    while len(events) < count and (response := await call.read()) is not grpc.aio.EOF:
        # The time that an answer waited and took is all that may differ between two runs.
        event = response.event
        if event.HasField("finished"):
            for name in ("queue_time", "total_time"):
                event.finished.usage.ClearField(name)
        events.append(event)
    return events


def tokens(events: Sequence[StreamEvent]) -> list[Token]:
    """The tokens of all deltas.

    Deltas that come faster than they are read are joined: how many events there are, and which
    tokens each holds, depends on the machine.
    """
    return [token for event in events for token in event.delta.tokens]


async def read_tokens(call: Any, count: int) -> list[StreamEvent]:
    """The next events that hold so many tokens or more, fewer at its end."""
    events: list[StreamEvent] = []
    while len(tokens(events)) < count and (more := await read(call, 1)):
        events += more
    return events


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with, whatever it answered before."""
    return await call.code(), await call.details()


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(TEXT, bos=False, eos=False)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=6))
async def test_any_pattern_of_breaks_gives_the_undisturbed_answer(
    gateway: Any, model: Any, ids: list[int], steps: list[tuple[int, int]]
) -> None:
    undisturbed = gateway.stub.TextCompleteStream(request())
    tell(model, await model.starts.get(), ids, end=True)
    expected = await read(undisturbed, 1000)

    name = str(uuid.uuid4())
    call = gateway.stub.TextCompleteStream(request(name))
    start = await model.starts.get()
    seen = await read(call, 1)
    made = 0
    for count, reads in steps:
        tell(model, start, ids[made : made + count])
        made = min(made + count, len(ids))
        seen += await read_tokens(call, min(reads, made - len(tokens(seen))))
        call.cancel()
        call = resume(gateway, name, len(seen))
    tell(model, start, ids[made:], end=True)
    seen += await read(call, 1000)
    assert seen == await read(resume(gateway, name, 0), 1000)
    assert [event.event_number for event in seen] == [*range(1, len(seen) + 1)]
    assert tokens(seen) == tokens(expected)
    texts = ["".join(event.delta.text for event in events) for events in (seen, expected)]
    assert texts[0] == texts[1]
    assert seen[-1].finished == expected[-1].finished


async def test_deadline_of_the_first_call_is_not_what_a_later_cancel_is_logged_as(
    gateway: Any, model: Any, log: Any
) -> None:
    call = gateway.stub.TextCompleteStream(request("named"), timeout=2)
    await model.starts.get()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await gateway.stub.CancelStream(CancelStreamRequest(stream_name="named"))
    assert (await log.wait_for("request finished"))["code"] == "CANCELLED"


async def test_stream_that_ended_without_a_reader_is_replayed_as_often_as_asked(
    gateway: Any, model: Any, ids: list[int]
) -> None:
    call = gateway.stub.TextCompleteStream(request("ended"))
    start = await model.starts.get()
    await read(call, 1)
    call.cancel()
    tell(model, start, ids, end=True)
    first, second = [await read(resume(gateway, "ended", 0), 1000) for _ in range(2)]
    assert first == second
    assert [event.event_number for event in first] == [*range(1, len(first) + 1)]
    assert [token.id for token in tokens(first)] == ids


async def test_chat_streams_are_resumed_as_text_streams_are(gateway: Any, model: Any) -> None:
    dialog = Dialog(messages=[Message(role=ROLE_USER, content="Hello")])
    call = gateway.stub.ChatCompleteStream(
        ChatCompleteStreamRequest(dialogs=[dialog], stream_name="chat")
    )
    started = await call.read()
    await model.starts.get()
    call.cancel()
    assert (await resume(gateway, "chat", 0).read()).event == started.event


async def test_second_reader_takes_the_stream_over(
    gateway: Any, model: Any, ids: list[int]
) -> None:
    first = gateway.stub.TextCompleteStream(request("taken"))
    start = await model.starts.get()
    await read(first, 1)
    second = resume(gateway, "taken", 1)
    assert await refusal(first) == (grpc.StatusCode.ABORTED, "another call reads the stream now")
    tell(model, start, ids, end=True)
    assert [token.id for token in tokens(await read(second, 1000))] == ids


async def test_name_of_a_known_stream_is_refused_and_accounted_for(
    gateway: Any, model: Any, log: Any
) -> None:
    call = gateway.stub.TextCompleteStream(request("twice"))
    await read(call, 1)
    code, message = await refusal(gateway.stub.TextCompleteStream(request("twice")))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "there is a stream with the stream_name 'twice'" in message
    line = await log.wait_for("request finished")
    assert (line["code"], line["method"]) == ("ALREADY_EXISTS", "TextCompleteStream")


async def test_name_of_a_refused_stream_stays_free(gateway: Any, model: Any) -> None:
    refused = gateway.stub.TextCompleteStream(request("again", top_logprobs=99))
    assert (await refusal(refused))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert len(await read(gateway.stub.TextCompleteStream(request("again")), 1)) == 1


@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 129])
@pytest.mark.parametrize("method", ["TextCompleteStream", "ResumeStream", "CancelStream"])
async def test_bad_name_is_refused_by_its_rule(gateway: Any, method: str, name: str) -> None:
    calls = {
        "TextCompleteStream": lambda: gateway.stub.TextCompleteStream(request(name or "-" * 129)),
        "ResumeStream": lambda: resume(gateway, name, 0),
        "CancelStream": lambda: gateway.stub.CancelStream(CancelStreamRequest(stream_name=name)),
    }
    code, message = await refusal(calls[method]())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("stream_name: must be 1 to 128 characters of A-Z, a-z, 0-9")


async def test_stream_without_a_reader_is_cancelled_after_the_grace_time(
    start_gateway: Any, start_server: Any, tokenizer_target: str, model: Any
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, stream_grace=0.1)
    await gateway.until(serving=True)
    call = gateway.stub.TextCompleteStream(request("left"))
    start = await model.starts.get()
    await read(call, 1)
    call.cancel()
    assert await model.cancels.get() == start.sequence_id
    code, message = await refusal(resume(gateway, "left", 1))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "had no reader for 0.1 seconds" in message


async def test_cancel_ends_the_stream_its_reader_and_its_sequence(gateway: Any, model: Any) -> None:
    call = gateway.stub.TextCompleteStream(request("stopped"))
    start = await model.starts.get()
    await read(call, 1)
    await gateway.stub.CancelStream(CancelStreamRequest(stream_name="stopped"))
    assert await model.cancels.get() == start.sequence_id
    assert await refusal(call) == (grpc.StatusCode.CANCELLED, "the stream was cancelled")
    again = gateway.stub.CancelStream(CancelStreamRequest(stream_name="stopped"))
    assert (await refusal(again))[0] is grpc.StatusCode.NOT_FOUND


async def test_deadline_of_the_first_call_does_not_end_a_stream_that_has_begun(
    gateway: Any, model: Any, ids: list[int]
) -> None:
    call = gateway.stub.TextCompleteStream(request("slow"), timeout=2)
    start = await model.starts.get()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    tell(model, start, ids, end=True)
    events = await read(resume(gateway, "slow", 0), 1000)
    assert [token.id for token in tokens(events)] == ids
    assert events[-1].finished.finish_reason == FINISH_REASON_CONTEXT_LENGTH


async def test_sequences_of_a_named_stream_carry_the_request_id_of_its_first_call(
    gateway: Any, model: Any
) -> None:
    call = gateway.stub.TextCompleteStream(request("logged"), metadata=(("x-request-id", "abc"),))
    assert (await model.starts.get()).sequence_id.startswith("abc.")
    call.cancel()


async def made(count: int, release: asyncio.Event | None = None) -> AsyncGenerator[bytes, None]:
    """Events as the gateway makes them; the last waits for `release`."""
    for number in range(1, count + 1):
        if number == count and release is not None:
            await release.wait()
        yield StreamEvent(event_number=number, delta=Delta(text="x")).SerializeToString()


def limits(**changed: Any) -> StreamLimits:
    return StreamLimits(**{"grace": 60.0, "buffer_bytes": 10**6, "ended_bytes": 10**6, **changed})


def number_of(event: bytes) -> int:
    return StreamEvent.FromString(event).event_number


async def all_of(stream: AsyncGenerator[Any, None]) -> list[int]:
    async with aclosing(stream) as events:
        return [number_of(event) async for event in events]


async def begin(streams: NamedStreams, name: str, events: AsyncGenerator[Any, None]) -> None:
    """Begins a stream and reads its first event alone."""
    async with aclosing(streams.open(name, events, None)) as reading:
        assert number_of(await anext(reading)) == 1


async def test_full_buffer_drops_the_oldest_events_while_nobody_reads() -> None:
    streams, release = NamedStreams(limits(buffer_bytes=4 * (EVENT_OVERHEAD + 8))), asyncio.Event()
    await begin(streams, "a", made(10, release))
    release.set()
    await streams.drain()
    assert await all_of(streams.resume("a", 6)) == [7, 8, 9, 10]
    with pytest.raises(RequestError, match="events up to 6 are no longer kept") as lost:
        streams.resume("a", 5)
    assert lost.value.code is grpc.StatusCode.OUT_OF_RANGE
    with pytest.raises(RequestError, match="must be at most 10, the last event, not 11"):
        streams.resume("a", 11)


@given(bytes_=st.integers(1, 10 * EVENT_OVERHEAD), pauses=st.lists(st.booleans(), max_size=30))
async def test_slow_reader_loses_nothing_however_small_the_buffer(
    bytes_: int, pauses: list[bool]
) -> None:
    streams = NamedStreams(limits(buffer_bytes=bytes_))
    seen = []
    async with aclosing(streams.open("a", made(30), None)) as events:
        async for event in events:
            seen.append(number_of(event))
            if pauses and pauses.pop():
                await asyncio.sleep(0)
    assert seen == list(range(1, 31))
    await streams.close()


def ended_bytes(streams: int) -> int:
    """So much that so many ended streams of three events each are kept."""
    return streams * (STREAM_OVERHEAD + 4 * EVENT_OVERHEAD)


async def test_ended_streams_are_kept_up_to_a_bound_in_all() -> None:
    streams = NamedStreams(limits(ended_bytes=ended_bytes(1)))
    for name in ("first", "second"):
        assert await all_of(streams.open(name, made(3), None)) == [1, 2, 3]
    assert await all_of(streams.resume("second", 0)) == [1, 2, 3]
    with pytest.raises(RequestError, match="there is no stream with the stream_name 'first'"):
        streams.resume("first", 0)
    await streams.close()


async def test_callers_many_ended_streams_do_not_push_out_anothers() -> None:
    streams = NamedStreams(limits(ended_bytes=ended_bytes(4)))
    caller.identify(caller.Caller("ben", frozenset({"generate"})))
    await all_of(streams.open("kept", made(3), None))
    caller.identify(caller.Caller("ann", frozenset({"generate"})))
    for number in range(9):
        await all_of(streams.open(f"ann-{number}", made(3), None))
    assert await all_of(streams.resume("ann-8", 0)) == [1, 2, 3]
    with pytest.raises(RequestError, match="there is no stream"):
        streams.resume("ann-5", 0)
    caller.identify(caller.Caller("ben", frozenset({"generate"})))
    assert await all_of(streams.resume("kept", 0)) == [1, 2, 3]
    await streams.close()


async def test_ended_stream_costs_no_more_than_is_counted() -> None:
    streams, count = NamedStreams(limits(ended_bytes=10**9)), 200
    await all_of(streams.open("warm-up", made(1), None))
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(count):
        await all_of(streams.open(f"{number:0128d}", made(1), None))
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / count < STREAM_OVERHEAD
    await streams.close()


async def test_names_belong_to_their_callers() -> None:
    streams = NamedStreams(limits())

    async def by(name: str) -> list[int]:
        caller.identify(caller.Caller(name, frozenset({"generate"})))
        await begin(streams, "same", made(3))
        return await all_of(streams.resume("same", 1))

    for read_on in await asyncio.gather(by("anna"), by("ben")):
        assert read_on == [2, 3]
    with pytest.raises(RequestError, match="there is no stream"):
        await streams.cancel("same")
    await streams.close()


async def test_drain_waits_for_streams_with_and_without_a_reader() -> None:
    streams, release = NamedStreams(limits()), asyncio.Event()
    await begin(streams, "left", made(3, release))
    reading = asyncio.create_task(all_of(streams.open("read", made(3, release), None)))
    drain = asyncio.create_task(streams.drain())
    await asyncio.wait({drain}, timeout=0)
    assert not drain.done()
    release.set()
    await drain
    assert await reading == [1, 2, 3]
    assert await all_of(streams.resume("left", 1)) == [2, 3]
    await streams.close()


async def test_request_that_does_not_begin_within_the_deadline_is_dropped() -> None:
    streams = NamedStreams(limits())
    with pytest.raises(RequestError, match="deadline passed before the first event") as expired:
        await all_of(streams.open("a", made(1, asyncio.Event()), within=0.01))
    assert expired.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(RequestError, match="there is no stream"):
        streams.resume("a", 0)
