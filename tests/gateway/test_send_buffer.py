"""Events that wait for a client: joined if possible, in order, and bounded."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.generation.generation import Outcome
from gateway.generation.send_buffer import SendBuffer
from llama.v1.model_pb2 import SequenceError, TokenEvent, TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH
from serving.errors import RequestError

Buffer = SendBuffer[int, Outcome]
PLENTY = 1 << 20  # bytes
# Ids of the events of some places, in the order in which they come.
comings = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(3, 99), max_size=4)))


def event(ids: Sequence[int], *, alternatives: bool = False) -> TokenEvent:
    top = [TopLogprobs()] * len(ids) if alternatives else []
    return TokenEvent(ids=ids, logprobs=[-float(each) for each in ids], top=top)


async def read(events: Buffer, count: int) -> list[TokenEvent]:
    read = [await asyncio.wait_for(events.get(), 1) for _ in range(count)]
    return [outcome for _, outcome in read if isinstance(outcome, TokenEvent)]


@given(comings)
async def test_each_place_reads_its_tokens_once_and_in_order(
    coming: list[tuple[int, list[int]]],
) -> None:
    events, read = Buffer(PLENTY), dict[int, list[int]]()
    for place, ids in coming:
        events.put(place, event(ids))
    for _ in {place for place, _ in coming}:
        place, outcome = await asyncio.wait_for(events.get(), 1)
        assert isinstance(outcome, TokenEvent)
        assert list(outcome.logprobs) == [-float(each) for each in outcome.ids]
        read[place] = list(outcome.ids)
    wanted = {each: [i for p, ids in coming if p == each for i in ids] for each, _ in coming}
    assert read == wanted


async def test_a_last_event_ends_what_it_is_joined_with() -> None:
    events = Buffer(PLENTY)
    events.put(0, event([7]))
    events.put(0, TokenEvent(finish_reason=FINISH_REASON_LENGTH, cached_prompt_tokens=5))
    [joined] = await read(events, 1)
    assert list(joined.ids) == [7]
    assert joined.finish_reason == FINISH_REASON_LENGTH
    assert joined.cached_prompt_tokens == 5


@pytest.mark.parametrize(
    "later", [TokenEvent(error=SequenceError(code=14)), event([8], alternatives=True)]
)
async def test_what_cannot_be_one_event_stays_two(later: TokenEvent) -> None:
    events = Buffer(PLENTY)
    events.put(0, event([7]))
    events.put(0, later)
    first, second = await read(events, 2)
    assert list(first.ids) == [7]
    assert second == later


async def test_what_was_read_is_not_added_to() -> None:
    events = Buffer(PLENTY)
    events.put(0, event([7]))
    [first] = await read(events, 1)
    events.put(0, event([8]))
    [second] = await read(events, 1)
    assert (list(first.ids), list(second.ids)) == ([7], [8])


async def test_joined_events_count_in_full() -> None:
    """Too many bytes cancel the task that should have read them."""

    async def falls_behind() -> None:
        async with Buffer(event([7]).ByteSize() * 10) as events:
            for _ in range(11):
                events.put(0, event([7]))
            await asyncio.Event().wait()  # until it is cancelled

    with pytest.raises(RequestError, match="reads too slowly"):
        await falls_behind()
