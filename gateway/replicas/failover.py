"""A sequence that outlives the replica it runs at. Sampling draws each token from the seed and the
token's position alone, so prompt + answer so far, sent to another replica of the same model, goes
on exactly as if nothing had happened: whoever listens notices a pause, and one last event as ever.
"""

import time
from typing import Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from gateway.replicas.prefix_index import block_digests
from gateway.replicas.replica import Deliver, Replica, RunningSequence
from llama.v1 import model_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_CANCELLED
from serving.telemetry import request_id

# How often a sequence is begun again; a bound, as it may itself be what its replicas die of.
MOST_RESTARTS = 5
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


class Placement(Protocol):
    """Finds replicas for sequences."""

    def place(self, sequence: "ResumableSequence") -> None:
        """Lets it run at a replica, as soon as one is ready; or gives it up."""

    def withdraw(self, sequence: "ResumableSequence") -> None:
        """It needs no replica any more."""


class ResumableSequence:
    """One generation, at one replica after the other."""

    def __init__(
        self,
        start: model_pb2.StartSequence,
        fingerprint: str,
        deliver: Deliver,
        placement: Placement,
    ) -> None:
        """Only replicas with this `fingerprint` run it: others would go on differently."""
        self.fingerprint = fingerprint
        self.resumed = 0  # how often it went on after its replica was lost
        self.lost = False  # its replica was, and it has no other yet
        self._start = start
        self._deliver = deliver
        self._placement = placement
        self._call_id = request_id.current()
        self._answer: list[int] = []
        self._prompt_is_reported = not start.prompt_logprobs
        self._cached_prompt_tokens: int | None = None  # of the first start, as soon as it is known
        self._replica: Replica | None = None
        self._running: RunningSequence | None = None
        self._restarts = 0
        self._cancelled = self._ended = False
        self._clock = _Clock()

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self._start.prompt_ids, *self._answer]

    def block_digests(self) -> list[bytes]:
        """By which replicas that know its beginning are found."""
        return block_digests(self.ids, self._start.cache_scope)

    def run_at(self, replica: Replica) -> None:
        """Begins there, or goes on."""
        self.resumed += self.lost
        self.lost = False
        self._clock.begin()
        self._replica = replica
        self._running = replica.start(self._remainder(), self._call_id, self._take)

    def cancel(self) -> None:
        """Asks for an early end; the last event still comes. Harmless after the end."""
        if self._cancelled:
            return
        self._cancelled = True
        if self._running is not None:
            self._running.cancel()
        elif not self._ended:  # it waits for a replica
            self._placement.withdraw(self)
            self._end_cancelled()

    def give_up(self, message: str) -> None:
        """Ends it with UNAVAILABLE, as no replica can go on with it."""
        error = model_pb2.SequenceError(code=_UNAVAILABLE, message=message)
        self._end(model_pb2.TokenEvent(error=error))

    def _remainder(self) -> model_pb2.StartSequence:
        """What is left to do."""
        start = model_pb2.StartSequence()
        start.CopyFrom(self._start)
        start.prompt_ids.extend(self._answer)
        start.generated_tokens = len(self._answer)
        start.prompt_logprobs = not self._prompt_is_reported
        return start

    def _take(self, event: model_pb2.TokenEvent) -> None:
        if event.error.code == _UNAVAILABLE:
            self._interrupted(event.error.message)
            return
        if event.ids:
            self._note(event)
        if event.finish_reason or event.HasField("error"):
            self._finish(event)
        else:
            self._deliver(event)

    def _note(self, event: model_pb2.TokenEvent) -> None:
        self._clock.made_tokens()
        if self._cached_prompt_tokens is None:
            self._cached_prompt_tokens = event.cached_prompt_tokens
        if self._prompt_is_reported:
            self._answer += event.ids
        else:
            self._answer += event.ids[len(self._start.prompt_ids) :]
            self._prompt_is_reported = True

    def _finish(self, event: model_pb2.TokenEvent) -> None:
        if self._replica is not None:
            self._replica.prefixes.add(self.block_digests())
        if self._restarts:
            if self._cached_prompt_tokens is not None:
                event.cached_prompt_tokens = self._cached_prompt_tokens
            self._clock.add_to(event.timings)
        self._end(event)

    def _interrupted(self, message: str) -> None:
        """The replica was lost, or takes no sequences any more."""
        replica, self._running = self._replica, None
        self._clock.interrupt()
        if replica is not None and replica.info is not None:
            replica.refused()
        else:
            self.lost = True
        if self._cancelled:
            self._end_cancelled()
        elif self._restarts == MOST_RESTARTS:
            self.give_up(f"{message}; it was begun {MOST_RESTARTS + 1} times")
        else:
            self._restarts += 1
            self._placement.place(self)

    def _end_cancelled(self) -> None:
        event = model_pb2.TokenEvent(finish_reason=FINISH_REASON_CANCELLED)
        event.cached_prompt_tokens = self._cached_prompt_tokens or 0
        self._clock.begin()
        self._clock.add_to(event.timings)
        self._end(event)

    def _end(self, event: model_pb2.TokenEvent) -> None:
        self._ended, self._running = True, None
        self._deliver(event)


class _Clock:
    """Where the time of a sequence went before its last start; a lost replica takes its own account
    of it along, so this is what it looks like from here: waiting for a replica counts as queued,
    and what the lost ones spent on computing is not known.
    """

    def __init__(self) -> None:
        self._queued = self._prefill = self._decode = 0.0  # seconds
        self._started_at = 0.0
        self._first_at: float | None = None
        self._last_at = 0.0
        self._interrupted_at: float | None = None

    def begin(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None:
            self._queued += now - self._interrupted_at
        self._started_at, self._first_at, self._interrupted_at = now, None, None

    def made_tokens(self) -> None:
        self._last_at = time.monotonic()
        if self._first_at is None:
            self._first_at = self._last_at

    def interrupt(self) -> None:
        if self._first_at is None:
            self._interrupted_at = self._started_at
            return
        self._prefill += self._first_at - self._started_at
        self._decode += self._last_at - self._first_at
        self._interrupted_at = self._last_at

    def add_to(self, timings: model_pb2.Timings) -> None:
        _add(timings.queued, self._queued)
        _add(timings.prefill, self._prefill)
        _add(timings.decode, self._decode)


def _add(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(duration.ToNanoseconds() + round(seconds * 1e9))
