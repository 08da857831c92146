"""Admission: which generations run at the replicas, which wait, and which requests are refused.

A request that finds no room is refused at once: its caller can try another gateway, and in an
unbounded queue it would only time out. The replicas get only slightly more generations than they
run at once, because their own queues do not know API keys: `gateway.admission.fair_queue` decides
which generation is next, and `gateway.admission.fair_share` which waiting request is displaced when
the queue is full.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from gateway.admission.fair_queue import Claim, FairQueue
from gateway.admission.fair_share import Holding, SharedRoom
from gateway.admission.quota import Bounds, KeyQuota, Quota
from gateway.admission.throughput import ThroughputEstimator
from gateway.admission.ticket import Size, Ticket
from gateway.admission.wait_estimate import WaitEstimate
from serving.errors import RequestError, resource_exhausted, unavailable
from serving.security import caller
from serving.security.caller import Caller

# The replicas get this fraction more than they run at once, so that the next generation is there
# when one ends.
_AHEAD = 0.25
# The quota that the error of a displaced request names.
SHARE = "key.share"


class Admission:
    """Counts running and waiting generations, and grants tickets; used from one event loop."""

    def __init__(
        self,
        bounds: Bounds,
        batch_capacity: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`batch_capacity` returns how many sequences the ready replicas run at once."""
        self.clock = clock
        self._bounds = bounds
        self._batch_capacity = batch_capacity
        self.displaced_sequences: dict[str, int] = {}  # since the start, by key
        room, tokens = SharedRoom(bounds.max_sequences), SharedRoom(bounds.max_tokens)
        self._sequences = Quota(room, "sequences", "has", "max_queued_sequences")
        self._tokens = Quota(tokens, "tokens", "may take", "max_queued_tokens")
        self._requests: dict[Holding, Admitted] = {}
        self._queue = FairQueue()
        self._tickets: dict[Claim, Ticket] = {}  # not yet granted
        self._running = 0
        self._closed = False
        self._throughput = ThroughputEstimator()
        self._waits = WaitEstimate(self._queue, self._throughput, clock)

    @property
    def sequences(self) -> int:
        """Generations of all requests that have not ended."""
        return self._sequences.room.used

    @property
    def running_sequences(self) -> int:
        """Generations that were given to a replica."""
        return self._running

    @property
    def queued_sequences(self) -> int:
        """Generations whose tickets are not granted yet."""
        return len(self._tickets)

    @property
    def queued_tokens(self) -> Mapping[str, int]:
        """The estimated tokens of the queued generations, by the name of the caller's key."""
        return self._queue.waiting_tokens

    def key_quotas(self) -> list[KeyQuota]:
        """The quotas of the current caller's own key, as far as it has any."""
        key = caller.current()
        own = (self._sequences, key.limits.max_sequences), (self._tokens, key.limits.max_tokens)
        return [
            quota.of_key(key.name, bound, self._waits.retry_after(key, priority=0))
            for quota, bound in own
            if bound is not None
        ]

    def close(self) -> None:
        """Refuses new requests; admitted ones continue."""
        self._closed = True

    @contextmanager
    def admit(
        self, sequences: int, priority: int, time_remaining: float | None
    ) -> Iterator["Admitted"]:
        """Holds room for a request of the current caller until the `with` block ends.

        RESOURCE_EXHAUSTED if there is no room, or if a request of another key displaces this one;
        UNAVAILABLE once closed. `time_remaining` is in seconds; None: the request has no deadline.
        """
        if self._closed:
            raise unavailable("this gateway is shutting down")
        deadline = None if time_remaining is None else self.clock() + time_remaining
        admitted = Admitted(self, caller.current(), priority, deadline)
        self._requests[admitted.holding] = admitted
        try:
            self.reserve_sequences(admitted, sequences)
            with admitted.interruptible():
                yield admitted
        finally:
            del self._requests[admitted.holding]
            self.release(admitted)

    def reserve_sequences(self, admitted: "Admitted", sequences: int) -> None:
        """Reserves room for a request's sequences; RESOURCE_EXHAUSTED if there is too little."""
        self._reserve(self._sequences, admitted, sequences, admitted.caller.limits.max_sequences)

    def reserve_tokens(self, admitted: "Admitted", tokens: int) -> None:
        """Reserves room for a request's tokens; RESOURCE_EXHAUSTED if there is too little."""
        quota, own_bound = self._tokens, admitted.caller.limits.max_tokens
        for bound, whose, subject in (
            (quota.room.bound, "", quota.setting),
            (own_bound, " of this key", "key.max_tokens"),
        ):
            if bound is not None and tokens > bound:
                message = quota.never_fits(tokens, bound, whose)
                raise resource_exhausted(message, subject, retry_after=None)
        self._reserve(quota, admitted, tokens, own_bound)

    def release(self, admitted: "Admitted") -> None:
        """Frees all room that a request holds."""
        self._sequences.room.release(admitted.holding)
        self._tokens.room.release(admitted.holding)

    def queue(self, admitted: "Admitted", sizes: Sequence[Size]) -> list[Ticket]:
        """A ticket for each generation; RESOURCE_EXHAUSTED if the deadline would pass first."""
        key = admitted.caller
        claims = [
            Claim(
                key.name,
                key.limits.weight,
                admitted.priority,
                size.prompt + self._throughput.answer_tokens(size.max_answer),
            )
            for size in sizes
        ]
        if self._tickets or self._running + len(claims) > self._capacity():
            tokens = sum(claim.tokens for claim in claims)
            self._waits.require_in_time(key, admitted.priority, tokens, admitted.deadline)
        tickets = [
            Ticket(self, claim, size, admitted.holding)
            for claim, size in zip(claims, sizes, strict=True)
        ]
        for claim, ticket in zip(claims, tickets, strict=True):
            self._tickets[claim] = ticket
            self._queue.push(claim)
        self._grant()
        return tickets

    def withdraw(self, claim: Claim) -> None:
        """Removes a ticket that was not granted from the queue."""
        del self._tickets[claim]
        self._queue.remove(claim)
        self._record(0)

    def charge(self, claim: Claim, tokens: int) -> None:
        """Counts tokens that a replica computed for a granted ticket."""
        self._queue.charge(claim, tokens)
        if self._tickets or self._throughput.measuring:
            self._record(tokens)
            self._grant()  # another replica may have become ready

    def end(self, claim: Claim, answer_tokens: int | None, unused_tokens: int) -> None:
        """Ends a granted ticket; `unused_tokens` were charged but not computed."""
        if answer_tokens is not None:  # else it only scored its prompt
            self._throughput.record_answer(answer_tokens)
        self._queue.charge(claim, -unused_tokens)
        self._queue.end(claim)
        self._running -= 1
        self._grant()

    def _grant(self) -> None:
        if not self._tickets:
            return
        capacity, tokens = self._capacity(), 0
        while self._tickets and self._running < capacity:
            claim = self._queue.pop()
            ticket = self._tickets.pop(claim)
            ticket.holding.begun = True
            self._running += 1
            self._queue.charge(claim, ticket.size.prompt)
            tokens += ticket.size.prompt
            ticket.grant()
        self._record(tokens)

    def _record(self, tokens: int) -> None:
        self._throughput.record(tokens, waiting=bool(self._tickets), now=self.clock())

    def _capacity(self) -> int:
        if self._bounds.max_running is not None:
            return self._bounds.max_running
        # With no ready replica, grant one ticket at a time so that it fails fast with UNAVAILABLE.
        return max(1, math.ceil(self._batch_capacity() * (1 + _AHEAD)))

    def _reserve(
        self, quota: Quota, admitted: "Admitted", amount: int, own_bound: int | None
    ) -> None:
        """Reserves room, displacing waiting requests if need be; else RESOURCE_EXHAUSTED."""
        holding = admitted.holding
        if own_bound is not None and quota.room.used_by(holding.key) + amount > own_bound:
            message = quota.key_is_full(holding, amount, own_bound)
            subject = f"key.max_{quota.unit}"
            raise resource_exhausted(message, subject, self._retry_after(admitted))
        displaced = quota.room.displaced_by(holding, amount)
        if displaced is None:
            message = quota.is_full(holding, amount)
            raise resource_exhausted(message, quota.setting, self._retry_after(admitted))
        for each in displaced:
            self._displace(self._requests[each], quota, holding)
        quota.room.reserve(holding, amount)

    def _displace(self, admitted: "Admitted", quota: Quota, newcomer: Holding) -> None:
        """Fails a request none of whose generations has begun."""
        message = quota.displaced(admitted.holding, newcomer)
        error = resource_exhausted(message, SHARE, self._retry_after(admitted))
        key, sequences = admitted.holding.key, self._sequences.room.amount(admitted.holding)
        self.displaced_sequences[key] = self.displaced_sequences.get(key, 0) + sequences
        self.release(admitted)
        admitted.displace(error)

    def _retry_after(self, admitted: "Admitted") -> float:
        return self._waits.retry_after(admitted.caller, admitted.priority)


class Admitted:
    """A request that holds room; used only by the task that creates it."""

    def __init__(
        self, admission: Admission, caller: Caller, priority: int, deadline: float | None
    ) -> None:
        """`deadline` is a time of the admission's clock."""
        self.caller = caller
        self.priority = priority
        self.deadline = deadline
        self.holding = Holding(caller.name, caller.limits.weight, priority)
        self._admission = admission
        self._tickets: list[Ticket] | None = None  # None before it is queued
        self._task = asyncio.current_task()
        self._interruption: RequestError | None = None

    def queue(self, sizes: Sequence[Size]) -> list[Ticket]:
        """A ticket for each of the request's generations; RESOURCE_EXHAUSTED if they are too large,
        or if they would wait longer than the deadline allows.
        """
        if not sizes:  # every dialog was refused, so nothing will run
            self._tickets = []
            self._admission.release(self)
            return []
        self._admission.reserve_tokens(self, sum(size.prompt + size.max_answer for size in sizes))
        self._tickets = self._admission.queue(self, sizes)
        return self._tickets

    def displace(self, error: RequestError) -> None:
        """Fails the request with `error`; none of its generations may have begun."""
        if self._tickets is None:
            self._interruption = error
            if self._task is not None:
                self._task.cancel()
            return
        for ticket in self._tickets:
            ticket.displace(error)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises the reason in the `with` block if the request is displaced before it is queued."""
        before = 0 if self._task is None else self._task.cancelling()
        try:
            yield
        except asyncio.CancelledError:
            if self._interruption is None or self._task is None:
                raise
            if self._task.uncancel() > before:  # it was cancelled from elsewhere, too
                raise
            raise self._interruption from None
        finally:
            self._interruption = None  # its traceback refers to this frame
