"""The times of a generation that moves from replica to replica."""

import time

from google.protobuf.duration_pb2 import Duration

from llama.v1 import model_pb2


class GenerationClock:
    """The time that a generation spent before its last start.

    A lost replica's timings are lost with it, so the gateway measures them: waiting for a replica
    counts as queued, and the compute time of lost replicas is unknown.
    """

    def __init__(self) -> None:
        self.first_token_at: float | None = None  # at the current replica
        self._queued = self._prefill = self._decode = 0.0  # seconds
        self._started_at = self._last_token_at = 0.0
        self._interrupted_at: float | None = None

    def begin(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None:
            self._queued += now - self._interrupted_at
        self._started_at, self.first_token_at, self._interrupted_at = now, None, None

    def record_tokens(self, now: float) -> None:
        self._last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def interrupt(self) -> None:
        if self.first_token_at is None:
            self._interrupted_at = self._started_at
            return
        self._prefill += self.first_token_at - self._started_at
        self._decode += self._last_token_at - self.first_token_at
        self._interrupted_at = self._last_token_at

    def add_to(self, timings: model_pb2.Timings) -> None:
        _add(timings.queued, self._queued)
        _add(timings.prefill, self._prefill)
        _add(timings.decode, self._decode)


def _add(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(duration.ToNanoseconds() + round(seconds * 1e9))
