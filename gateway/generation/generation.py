"""One generation, from its place in the queue to its last event, at one or more replicas in turn.

Every token is sampled from the seed and the token's position alone. So another replica of the same
model, given the prompt and the answer so far, continues with the same tokens: the client only sees
a pause. A generation can outlive its call: its ticket is held until the replica has ended it.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto

import grpc

from gateway.admission.ticket import Ticket
from gateway.generation.answer import Answer
from gateway.generation.generation_clock import GenerationClock
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.prefix_index import block_digests
from gateway.replicas.replica import ReplicaClient
from llama.v1 import model_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_CANCELLED
from serving.telemetry import request_id

# How often a generation is restarted at most, because it may be what crashes its replicas.
MAX_RESTARTS = 5
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]

# An event of a generation, or the error that ends it.
Outcome = model_pb2.TokenEvent | Exception


class Status(Enum):
    QUEUED = auto()  # waits for its ticket to be granted
    MOVING = auto()  # waits for a replica: its first one, or another one
    RUNNING = auto()  # a replica computes it
    STOPPING = auto()  # a replica was asked to end it early
    ENDED = auto()  # its last outcome was delivered


class Generation:
    """Delivers outcomes; the last one is an exception or has a finish reason or an error."""

    def __init__(
        self,
        answer: Answer,
        start: model_pb2.StartSequence,
        ticket: Ticket,
        pool: ReplicaPool,
        deliver: Callable[[Outcome], None],
    ) -> None:
        self.answer = answer
        self.status = Status.QUEUED
        self.fingerprint = ""  # of the replicas that can run it: others would continue differently
        self.failovers = 0  # how often it continued after its replica was lost
        self.lost = False  # its replica was lost, and it has no other one yet
        self._start = start
        self._ticket = ticket
        self._pool = pool
        self._deliver = deliver
        self._request_id = request_id.current()
        self._answer_ids: list[int] = []
        self._reports_prompt = start.prompt_logprobs  # the next tokens include the prompt's
        self._cached_prompt_tokens: int | None = None  # at the first start
        self._computed = False  # a replica spent time on it
        self._replica: ReplicaClient | None = None
        self._sequence_id = ""  # at that replica
        self._restarts = 0
        self._clock = GenerationClock()
        ticket.granted.add_done_callback(self._on_grant)

    @property
    def prompt_tokens(self) -> int:
        return len(self._start.prompt_ids)

    @property
    def max_gen_len(self) -> int:
        """The most tokens that its answer may have, already limited to the context's room."""
        return self._start.sampling.max_gen_len

    @property
    def waited(self) -> float:
        """Seconds until its ticket was granted."""
        return self._ticket.waited

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self._start.prompt_ids, *self._answer_ids]

    @property
    def outstanding_tokens(self) -> int:
        """Tokens of prompt and answer that its replica may still have to compute."""
        remaining = self.max_gen_len - len(self._answer_ids)
        if self._clock.first_token_at is not None:
            return remaining
        return self.prompt_tokens + len(self._answer_ids) + remaining

    def block_digests(self) -> list[bytes]:
        """Digests of its blocks, to find replicas that have its beginning in their caches."""
        return block_digests(self.ids, self._start.cache_scope)

    def cancel(self) -> None:
        """Requests an early end; the last event is still delivered. No effect after the end."""
        match self.status:
            case Status.QUEUED if not self._ticket.is_granted:
                self._ticket.withdraw()
                self._end(model_pb2.TokenEvent(finish_reason=FINISH_REASON_CANCELLED))
            case Status.QUEUED:
                self._finish(model_pb2.TokenEvent(finish_reason=FINISH_REASON_CANCELLED))
            case Status.MOVING:
                self._pool.withdraw(self)
                self._finish_cancelled()
            case Status.RUNNING if self._replica is not None:
                self.status = Status.STOPPING
                self._replica.cancel(self._sequence_id)

    def run_at(self, replica: ReplicaClient) -> None:
        """Starts or continues it at a replica."""
        self.failovers += self.lost
        self.lost = False
        start = model_pb2.StartSequence()
        start.CopyFrom(self._start)
        start.prompt_ids.extend(self._answer_ids)
        start.generated_tokens = len(self._answer_ids)
        start.prompt_logprobs = self._reports_prompt
        self._clock.begin()
        self._replica = replica
        self._sequence_id = replica.start(start, self._request_id, self)
        self.status = Status.RUNNING

    def give_up(self, message: str) -> None:
        """Ends it with UNAVAILABLE, because no replica can continue it."""
        error = model_pb2.SequenceError(code=_UNAVAILABLE, message=message)
        self._finish(model_pb2.TokenEvent(error=error))

    def on_event(self, event: model_pb2.TokenEvent, now: float) -> bool:
        """Handles an event of its replica, received at `now`; returns whether it is the last."""
        if event.ids:
            self._on_tokens(event, now)
        if not event.finish_reason and not event.HasField("error"):
            self._deliver(event)
            return False
        if event.error.code == _UNAVAILABLE:
            self._on_interruption(event.error.message)
        else:
            self._on_last_event(event)
        return True

    def _on_grant(self, granted: asyncio.Future[None]) -> None:
        displaced = None if granted.cancelled() else granted.exception()
        if granted.cancelled() or self.status is Status.ENDED:
            return
        if isinstance(displaced, Exception):
            self._end(displaced)
            return
        try:
            self.fingerprint = self._pool.latest_model.fingerprint
            self.status = Status.MOVING
            self._pool.place(self)
        except Exception as error:  # reported to the reader of the outcomes
            self._ticket.end(self.prompt_tokens)
            self._end(error)

    def _on_tokens(self, event: model_pb2.TokenEvent, now: float) -> None:
        ids = event.ids
        self._clock.record_tokens(now)
        if self._cached_prompt_tokens is None:
            self._cached_prompt_tokens = event.cached_prompt_tokens
            self._computed = True
        if self._reports_prompt:
            self._reports_prompt = False
            reported = self.prompt_tokens - self._start.scored_from
            self._answer_ids += ids[reported:]
            self._ticket.served(len(ids) - reported)  # the prompt was charged before
        else:
            self._answer_ids += ids
            self._ticket.served(len(ids))

    def _on_last_event(self, event: model_pb2.TokenEvent) -> None:
        if self._replica is not None:
            self._replica.prefixes.add(self.block_digests())
        if self._restarts:
            if self._cached_prompt_tokens is not None:
                event.cached_prompt_tokens = self._cached_prompt_tokens
            self._clock.add_to(event.timings)
        self._finish(event)

    def _on_interruption(self, message: str) -> None:
        """Moves it to another replica: its own was lost, or accepts no more sequences."""
        self._clock.interrupt()
        stopping = self.status is Status.STOPPING
        if self._replica is not None and self._replica.info is not None:
            self._replica.refused()
        else:
            self.lost = True
        self.status = Status.MOVING
        if stopping:
            self._finish_cancelled()
        elif self._restarts == MAX_RESTARTS:
            self.give_up(f"{message}; gave up after {MAX_RESTARTS + 1} attempts")
        else:
            self._restarts += 1
            self._pool.place(self)

    def _finish_cancelled(self) -> None:
        event = model_pb2.TokenEvent(finish_reason=FINISH_REASON_CANCELLED)
        event.cached_prompt_tokens = self._cached_prompt_tokens or 0
        self._clock.begin()
        self._clock.add_to(event.timings)
        self._finish(event)

    def _finish(self, event: model_pb2.TokenEvent) -> None:
        """Ends its ticket, refunding prompt tokens that were not computed, and then itself."""
        self._computed |= event.timings.compute.ToNanoseconds() > 0
        self._ticket.end(event.cached_prompt_tokens if self._computed else self.prompt_tokens)
        self._end(event)

    def _end(self, outcome: Outcome) -> None:
        self.status = Status.ENDED
        self._deliver(outcome)
