"""One generation's right to run, and its size."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from gateway.admission.fair_queue import Claim
from gateway.admission.fair_share import Holding
from serving.errors import RequestError


class TicketOffice(Protocol):
    """The part of `Admission` that tickets use."""

    def clock(self) -> float:
        """The time in seconds."""

    def withdraw(self, claim: Claim) -> None:
        """A ticket that was not granted is no longer wanted."""

    def charge(self, claim: Claim, tokens: int) -> None:
        """The replicas served tokens of a granted ticket."""

    def end(self, claim: Claim, answer_tokens: int | None, unused_tokens: int) -> None:
        """A granted ticket is over; `unused_tokens` were charged and not computed.

        `answer_tokens` is None if there could be no answer.
        """


@dataclass(frozen=True, slots=True)
class Size:
    """The size of one generation, in tokens."""

    prompt: int
    max_answer: int


class Ticket:
    """One generation's right to run: it waits in the queue, then is granted.

    It ends exactly once: by `withdraw` or `displace` before it was granted, by `end` after.
    """

    def __init__(self, admission: TicketOffice, claim: Claim, size: Size, holding: Holding) -> None:
        self.size = size
        self.holding = holding  # the request's
        # Fails with the reason if the request is displaced.
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waited = 0.0  # seconds in the queue
        self._admission = admission
        self._claim = claim
        self._arrived = admission.clock()
        self._answer_tokens = 0

    @property
    def is_granted(self) -> bool:
        done = self.granted.done() and not self.granted.cancelled()
        return done and self.granted.exception() is None

    def grant(self) -> None:
        """Called by the admission alone."""
        self.waited = self._admission.clock() - self._arrived
        self.granted.set_result(None)

    def withdraw(self) -> None:
        """Leaves the queue; no effect on a granted ticket."""
        if not self.granted.done():
            self._admission.withdraw(self._claim)
            self.granted.cancel()

    def displace(self, error: RequestError) -> None:
        """Fails the ticket with `error`, unless it was granted or withdrawn."""
        if not self.granted.done():
            self._admission.withdraw(self._claim)
            self.granted.set_exception(error)

    def served(self, tokens: int) -> None:
        """Counts more tokens of the answer; runs with every token."""
        self._answer_tokens += tokens
        self._admission.charge(self._claim, tokens)

    def end(self, unused_prompt_tokens: int) -> None:
        """Ends a granted ticket; refunds the prompt tokens that were charged but not computed."""
        answer_tokens = self._answer_tokens if self.size.max_answer else None
        self._admission.end(self._claim, answer_tokens, unused_prompt_tokens)
