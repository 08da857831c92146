"""The records of a run, one per request, and the latencies computed from them.

Times are seconds since the start of the run, latencies are seconds. All latencies count from the
time at which the request was meant to be sent, `intended`, and not from `sent`.
"""

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from client.results import FinishReason, Usage


@dataclass(frozen=True, slots=True)
class Success:
    """A complete answer."""

    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that ended with a status other than OK: `status` is its name in grpc.StatusCode."""

    status: str
    message: str
    request_id: str | None = None
    retry_after: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Record:
    """One request. `arrivals` are the times of the events with text.

    `shortened`: its drawn lengths were reduced to fit the context.
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
        """Seconds to the first text, or to the end of an answer without text; None: no answer."""
        if not self.completion_tokens:
            return None
        return (self.arrivals[0] if self.arrivals else self.ended) - self.intended

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive events with text."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds from the first text to the last, per token after the first; None below 2."""
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
    """The records of a run and its totals.

    `seconds`: from the start of the run to the end of its last answer. `cpu_share`: the CPU time of
    all threads of this process, as a fraction of one core. `interrupted`: a signal ended the run
    and cut off `unfinished` requests.
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
