"""The records of a run: one record per request, and the latencies that follow from it.

Times are seconds since the run began, latencies are seconds. All latencies count from when the
request was meant to be sent, `intended`, and not from when it was.
"""

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from client.results import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class Success:
    """An answer came to its end."""

    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failure:
    """The call ended with another status than OK; `status` is its name in grpc.StatusCode."""

    status: str
    message: str
    request_id: str | None = None
    retry_after: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Record:
    """One request. `arrivals` are the times of the events that brought text.

    `shortened`: the context would not have held the lengths that were drawn for it.
    """

    index: int
    intended: float
    sent: float
    arrivals: tuple[float, ...]
    ended: float
    shortened: bool
    outcome: Success | Failure

    @property
    def end_to_end(self) -> float:
        return self.ended - self.intended

    @property
    def time_to_first_token(self) -> float | None:
        """None without an answer. Tokens without text show at the end of the answer only."""
        if not self.completion_tokens:
            return None
        return (self.arrivals[0] if self.arrivals else self.ended) - self.intended

    @property
    def gaps(self) -> list[float]:
        """Between one event with text and the next."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def time_per_output_token(self) -> float | None:
        """From the first text to the last, per token after the first; None without a second."""
        if self.completion_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)

    @property
    def completion_tokens(self) -> int:
        match self.outcome:
            case Success(usage=usage):
                return usage.completion_tokens
            case Failure():
                return 0


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement.

    `seconds`: from the start of the run to the end of its last answer. `cpu_share`: the time that
    this process computed, all of its threads together, as a share of one core. `interrupted`: the
    user ended the run, and cut off `unfinished` requests.
    """

    started: datetime
    records: tuple[Record, ...]
    seconds: float
    cpu_seconds: float
    cpu_share: float
    interrupted: bool = False
    unfinished: int = 0

    @property
    def successes(self) -> list[tuple[Record, Success]]:
        return [
            (record, record.outcome)
            for record in self.records
            if isinstance(record.outcome, Success)
        ]

    @property
    def failures(self) -> list[tuple[Record, Failure]]:
        return [
            (record, record.outcome)
            for record in self.records
            if isinstance(record.outcome, Failure)
        ]
