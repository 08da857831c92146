"""Closed and open loop against real gRPC servers that see what is in flight."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chasqui.loadtest.generator import Closed, Open, Until, arrivals, run
from chasqui.loadtest.records import Failure, Success
from chasqui.loadtest.sender import Sender, clock
from chasqui.loadtest.workload import Work
from llama.v1 import chat_pb2
from llama.v1.chat_pb2 import StreamEvent
from llama.v1.sampling_pb2 import TokenIds

Response = chat_pb2.TextCompleteStreamResponse
WAIT = 60.0  # seconds until a test gives up


def work() -> Iterator[Work]:
    index = 0
    while True:
        request = chat_pb2.TextCompleteStreamRequest(prompt_ids=[TokenIds(ids=[7])])
        yield Work(index, request)
        index += 1


def answer() -> Iterator[Response]:
    usage = chat_pb2.Usage(completion_tokens=2)
    yield Response(event=StreamEvent(started=chat_pb2.Started()))
    yield Response(event=StreamEvent(delta=chat_pb2.Delta(text="two")))
    yield Response(event=StreamEvent(delta=chat_pb2.Delta(text="words")))
    yield Response(event=StreamEvent(finished=chat_pb2.Finished(usage=usage)))


@pytest.fixture
async def connect(start_gateway: Any) -> AsyncIterator[Callable[..., Sender]]:
    """A sender to a gateway whose streams behave as given."""
    senders: list[Sender] = []

    def connected(behaviour: Callable[..., Iterator[Response]]) -> Sender:
        senders.append(Sender(start_gateway(TextCompleteStream=behaviour)))
        return senders[-1]

    yield connected
    for sender in senders:
        await sender.__aexit__()


async def test_a_closed_loop_keeps_its_requests_in_flight(connect: Callable[..., Sender]) -> None:
    together = threading.Barrier(3)

    def behaviour(*_: object) -> Iterator[Response]:
        together.wait(WAIT)
        return answer()

    measured = await run(connect(behaviour), work(), Closed(3), Until(requests=6))

    assert [record.index for record in measured.records] == list(range(6))
    assert len(measured.successes) == 6


async def test_an_open_loop_does_not_wait_for_answers(connect: Callable[..., Sender]) -> None:
    together = threading.Barrier(4)

    def behaviour(*_: object) -> Iterator[Response]:
        together.wait(WAIT)
        return answer()

    measured = await run(connect(behaviour), work(), Open(500.0, seed=0), Until(requests=4))

    assert len(measured.successes) == 4
    intended = [record.intended for record in measured.records]
    assert intended == pytest.approx(list(islice(arrivals(500.0, 0), 4)))


async def test_a_duration_ends_the_sending_and_awaits_the_answers(
    connect: Callable[..., Sender],
) -> None:
    sender = connect(lambda *_: answer())

    closed = await run(sender, work(), Closed(2), Until(seconds=0.2))
    opened = await run(sender, work(), Open(100.0, seed=0), Until(seconds=0.2))

    for measured in (closed, opened):
        assert len(measured.successes) == len(measured.records) > 0
        assert all(record.intended < 0.2 for record in measured.records)
        assert measured.unfinished == 0


async def test_a_record_tells_when_text_came_and_what_it_cost(
    connect: Callable[..., Sender],
) -> None:
    origin = clock()
    # It should have been sent five seconds ago.
    record = await connect(lambda *_: answer()).send(next(work()), origin - 5.0, origin)

    assert isinstance(record.outcome, Success)
    assert record.outcome.usage.completion_tokens == 2
    assert len(record.arrivals) == 2
    assert 0 <= record.sent <= record.arrivals[0] <= record.arrivals[1] <= record.ended
    assert record.time_to_first_token == pytest.approx(5.0 + record.arrivals[0])
    assert record.end_to_end == pytest.approx(5.0 + record.ended)


async def test_a_refused_request_is_a_failure_by_its_status(connect: Callable[..., Sender]) -> None:
    def behaviour(_request: object, context: grpc.ServicerContext) -> Iterator[Response]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

    measured = await run(connect(behaviour), work(), Closed(1), Until(requests=2))

    outcomes = [record.outcome for record in measured.records]
    assert outcomes == [Failure("RESOURCE_EXHAUSTED", "the queue is full")] * 2


async def test_a_stream_that_ends_without_its_end_is_a_failure(
    connect: Callable[..., Sender],
) -> None:
    sender = connect(lambda *_: islice(answer(), 2))

    measured = await run(sender, work(), Closed(1), Until(requests=1))

    assert [failure.status for _, failure in measured.failures] == ["UNKNOWN"]


async def test_each_connection_of_a_sender_is_its_own(start_gateway: Any) -> None:
    addresses: set[str] = set()

    def behaviour(_request: object, context: grpc.ServicerContext) -> Iterator[Response]:
        addresses.add(context.peer())
        return answer()

    async with Sender(start_gateway(TextCompleteStream=behaviour), connections=3) as sender:
        await run(sender, work(), Closed(1), Until(requests=6))

    assert len(addresses) == 3


@given(st.floats(0.01, 1e4), st.integers(0, 2**64 - 1))
def test_arrivals_rise_and_repeat_with_their_seed(rate: float, seed: int) -> None:
    times = list(islice(arrivals(rate, seed), 50))

    assert times == sorted(times)
    assert times == list(islice(arrivals(rate, seed), 50))
    assert times != list(islice(arrivals(rate, seed ^ 1), 50))


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_arrivals_are_a_poisson_process(rate: float) -> None:
    times = list(islice(arrivals(rate, seed=0), 20_000))

    # Its counts per second have the rate as their mean and as their variance.
    seconds = int(times[-1])
    counts = [0] * seconds
    for time in times:
        if time < seconds:
            counts[int(time)] += 1
    mean = sum(counts) / seconds
    variance = sum((each - mean) ** 2 for each in counts) / seconds
    assert mean == pytest.approx(rate, rel=0.05)
    assert variance == pytest.approx(rate, rel=0.15)
