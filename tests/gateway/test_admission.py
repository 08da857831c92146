"""Requests that are admitted, that wait, and that are refused."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, field

import grpc
import pytest

from gateway.admission.admission import Admission, Admitted
from gateway.admission.quota import Bounds
from gateway.admission.ticket import Size, Ticket
from serving.errors import RequestError
from serving.security import caller
from serving.security.caller import Caller, CallerLimits

TEN = Size(prompt=4, max_answer=6)


@dataclass
class House:
    """An admission with one place, a clock that the test turns, and requests that stay."""

    bounds: Bounds = field(default_factory=lambda: Bounds(max_sequences=100, max_running=1))
    now: float = 0.0
    requests: ExitStack = field(default_factory=ExitStack)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.bounds, lambda: 1, lambda: self.now)

    def enter(
        self,
        key: str,
        limits: CallerLimits | None = None,
        *,
        sequences: int = 1,
        priority: int = 0,
        time_remaining: float | None = None,
    ) -> Admitted:
        caller.identify(Caller(key, frozenset({"generate"}), limits or CallerLimits()))
        admitted = self.admission.admit(sequences, priority, time_remaining)
        return self.requests.enter_context(admitted)

    def queue(self, key: str, *, count: int = 1, priority: int = 0) -> list[Ticket]:
        """Turns of a request of ten tokens each."""
        admitted = self.enter(key, sequences=count, priority=priority)
        return admitted.queue([TEN] * count)

    def serve(self, ticket: Ticket, seconds: float) -> None:
        """Six tokens, for each of which the time passes."""
        for _ in range(6):
            self.now += seconds
            ticket.served(1)
        ticket.end(0)


def granted(tickets: list[Ticket]) -> list[bool]:
    return [ticket.granted.done() for ticket in tickets]


async def test_key_with_one_request_is_next_after_the_running_one_of_a_key_with_many() -> None:
    house = House()
    many = house.queue("many", count=50)
    [one] = house.queue("one")
    assert granted([many[0], many[1], one]) == [True, False, False]
    house.serve(many[0], seconds=0.1)
    assert granted([many[1], one]) == [False, True]


async def test_higher_priority_is_next() -> None:
    house = House()
    [runs], [low], [high] = house.queue("a"), house.queue("b"), house.queue("a", priority=1)
    house.serve(runs, seconds=0.1)
    assert granted([low, high]) == [False, True]


async def test_key_above_its_own_bound_is_refused_and_others_are_not() -> None:
    house = House()
    house.enter("a", CallerLimits(max_sequences=2), sequences=2)
    with pytest.raises(RequestError, match="2 of 2 sequences of this key run or wait") as refused:
        house.enter("a", CallerLimits(max_sequences=2))
    assert refused.value.quota == "key.max_sequences"
    assert refused.value.retry_after == 1
    house.enter("b", CallerLimits(max_sequences=2))


async def test_tokens_are_bounded_by_key_and_in_all() -> None:
    house = House(Bounds(max_sequences=100, max_tokens=50))
    house.enter("a", CallerLimits(max_tokens=25)).queue([TEN] * 2)
    with pytest.raises(RequestError, match="20 of 25 tokens of this key") as refused:
        house.enter("a", CallerLimits(max_tokens=25)).queue([TEN])
    assert (refused.value.quota, refused.value.retry_after) == ("key.max_tokens", 1)
    with pytest.raises(RequestError, match="20 of 50 tokens run or wait") as refused:
        house.enter("b").queue([TEN] * 4)
    assert (refused.value.quota, refused.value.retry_after) == ("max_queued_tokens", 1)


async def test_request_that_never_fits_is_not_told_to_try_again() -> None:
    house = House(Bounds(max_sequences=100, max_tokens=50))
    with pytest.raises(RequestError, match="all requests together may take at most 50") as r:
        house.enter("a").queue([TEN] * 6)
    assert r.value.retry_after is None


async def test_request_without_generations_takes_nothing_and_waits_for_nothing() -> None:
    house = House(Bounds(max_sequences=1, max_tokens=10))
    house.queue("a")
    assert house.enter("b", sequences=0).queue([]) == []


async def test_everything_is_given_back_when_requests_end() -> None:
    house = House()
    tickets = house.queue("a", count=3)
    tickets[1].withdraw()
    tickets[2].withdraw()
    house.serve(tickets[0], seconds=0.1)
    house.requests.close()
    admission = house.admission
    assert (admission.sequences, admission.running_sequences) == (0, 0)
    assert (admission.queued_sequences, admission.queued_tokens) == (0, {})


async def test_queue_is_told_in_sequences_and_tokens_of_each_key() -> None:
    house = House()
    house.queue("a", count=3)
    house.queue("b")
    assert house.admission.running_sequences == 1
    assert house.admission.queued_sequences == 3
    assert house.admission.queued_tokens == {"a": 20, "b": 10}


async def test_wait_longer_than_the_deadline_is_refused_at_once_and_said_how_long() -> None:
    house = House()
    tickets = house.queue("a", count=9)
    house.serve(tickets[0], seconds=1)  # six seconds for ten tokens, the next prompt's included
    # Seven wait; with the patient one and the next one's own, 90 tokens: about 54 seconds.
    patient = house.enter("a", time_remaining=60).queue([TEN])
    with pytest.raises(RequestError, match=r"wait about 5\d\.\d seconds, .* in 20.0") as refused:
        house.enter("a", time_remaining=20).queue([TEN])
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.quota == "deadline"
    assert refused.value.retry_after == pytest.approx(34, rel=0.15)
    assert granted(patient) == [False]


async def test_key_with_little_waits_less_than_the_one_with_much() -> None:
    house = House()
    tickets = house.queue("a", count=20)
    house.serve(tickets[0], seconds=1)
    with pytest.raises(RequestError, match="the queue is too long"):
        house.enter("a", time_remaining=30).queue([TEN])
    house.enter("b", time_remaining=30).queue([TEN])


async def test_full_queue_says_when_what_is_ahead_will_have_been_served() -> None:
    house = House(Bounds(max_sequences=10, max_running=1))
    tickets = house.queue("a", count=10)
    house.serve(tickets[0], seconds=1)
    with pytest.raises(RequestError, match="10 of 10 sequences") as refused:
        house.enter("a")
    assert refused.value.retry_after == pytest.approx(48, rel=0.15)


@pytest.mark.parametrize("scored", [0, 50])
async def test_requests_that_score_make_no_answer_look_shorter(scored: int) -> None:
    house = House()
    [answered] = house.queue("a")
    house.serve(answered, seconds=1)
    for _ in range(scored):
        [ticket] = house.enter("a").queue([Size(prompt=4, max_answer=0)])
        ticket.end(0)
    house.queue("a", count=5)
    assert house.admission.queued_tokens == {"a": 4 * 10}


async def test_tokens_that_were_not_computed_are_given_back_to_the_key() -> None:
    house = House()
    [runs] = house.queue("a")
    cached, other = house.queue("b", count=2), house.queue("c", count=2)
    house.serve(runs, seconds=0.1)
    for _ in range(6):
        cached[0].served(1)
    cached[0].end(4)  # all of its prompt was in the cache: it cost six tokens
    for _ in range(4):
        other[0].served(1)
    other[0].end(0)  # it cost eight
    assert granted([cached[1], other[1]]) == [True, False]


async def test_without_a_replica_the_queue_moves_on() -> None:
    admission = Admission(Bounds(max_sequences=10), lambda: 0)
    with admission.admit(2, 0, None) as admitted:
        first, second = admitted.queue([TEN] * 2)
        assert granted([first, second]) == [True, False]
        first.end(4)
        assert granted([second]) == [True]
        second.end(4)


async def test_replicas_are_given_a_quarter_more_than_they_run() -> None:
    admission = Admission(Bounds(max_sequences=100), lambda: 8)
    with admission.admit(20, 0, None) as admitted:
        tickets = admitted.queue([TEN] * 20)
        assert sum(granted(tickets)) == 10


def refusal(ticket: Ticket) -> RequestError:
    """Why a ticket will not come."""
    error = ticket.granted.exception()
    assert isinstance(error, RequestError)
    return error


async def test_newest_waiting_request_of_the_key_with_the_most_gives_way() -> None:
    house = House(Bounds(max_sequences=6, max_running=1))
    *older, newest = [house.queue("a")[0] for _ in range(4)]
    house.queue("c", count=2)
    house.queue("b", count=2)
    assert granted(older) == [True, False, False]
    assert refusal(newest).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refusal(newest).quota, refusal(newest).retry_after) == ("key.share", 1)
    assert "this request's key had 4 of 6 sequences; the key's share is 2" in str(refusal(newest))
    assert house.admission.displaced_sequences == {"a": 1}


async def test_request_goes_as_a_whole_and_its_room_is_free_at_once() -> None:
    house = House(Bounds(max_sequences=8, max_running=1))
    house.queue("a")
    displaced = house.queue("a", count=7)
    house.queue("b", count=4)
    assert {refusal(ticket).quota for ticket in displaced} == {"key.share"}
    assert (house.admission.sequences, house.admission.queued_sequences) == (5, 4)
    assert house.admission.queued_tokens == {"b": 40}
    house.requests.close()
    assert house.admission.sequences == 0


async def test_request_that_has_begun_keeps_its_waiting_generations() -> None:
    house = House(Bounds(max_sequences=8, max_running=1))
    begun = house.queue("a", count=8)
    [other] = house.queue("b")
    assert granted([*begun, other]) == [True] + 8 * [False]
    house.serve(begun[0], seconds=0.1)
    assert granted([begun[1], other]) == [False, True]


async def test_tokens_are_shared_as_sequences_are() -> None:
    house = House(Bounds(max_sequences=100, max_tokens=50, max_running=1))
    *_, newest = [house.queue("a")[0] for _ in range(5)]
    house.queue("b", count=2)
    assert "had 50 of 50 tokens; the key's share is 25" in str(refusal(newest))
    with pytest.raises(RequestError, match="request may take 10; the key's share is 25") as refused:
        house.queue("b")
    assert refused.value.quota == "max_queued_tokens"


async def test_request_that_is_still_encoded_is_interrupted_when_it_is_displaced() -> None:
    house = House(Bounds(max_sequences=4, max_running=1))
    entered = asyncio.Event()

    async def encode() -> None:
        caller.identify(Caller("a", frozenset({"generate"})))
        with house.admission.admit(4, 0, None):
            entered.set()
            await asyncio.Event().wait()

    encoding = asyncio.create_task(encode())
    await entered.wait()
    house.queue("b")
    with pytest.raises(RequestError, match="a request of another key took the place") as displaced:
        await encoding
    assert displaced.value.quota == "key.share"
    assert (encoding.cancelling(), house.admission.sequences) == (0, 1)


async def test_without_keys_a_full_queue_displaces_nothing() -> None:
    house = House(Bounds(max_sequences=4, max_running=1))
    tickets = house.queue("", count=4, priority=-100)
    with pytest.raises(RequestError, match=r"the request has 1$"):
        house.queue("", priority=100)
    assert granted(tickets) == [True, False, False, False]
