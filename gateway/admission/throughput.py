"""Estimates the replicas' throughput, to predict how long a request waits. It is measured only
while generations wait, because replicas that are not full compute fewer tokens than they could.
"""

# The half-life of a measurement, in seconds during which generations wait.
_HALF_LIFE = 10.0
# Measured seconds below which there is no estimate.
_MIN_SECONDS = 0.5
# The weight of one answer in the moving average of answer lengths.
_LENGTH_WEIGHT = 1 / 16


class ThroughputEstimator:
    """Tokens per second, and tokens per answer. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._waiting = False  # since `_at`
        self._at = 0.0
        self._answer_tokens: float | None = None

    @property
    def measuring(self) -> bool:
        """Whether a generation waited at the last record."""
        return self._waiting

    def record(self, tokens: int, *, waiting: bool, now: float) -> None:
        """Counts served tokens; `waiting`: whether generations wait from now on."""
        if self._waiting:
            elapsed = now - self._at
            kept = 0.5 ** (elapsed / _HALF_LIFE)
            self._seconds = self._seconds * kept + elapsed
            self._tokens = self._tokens * kept + tokens
        self._waiting, self._at = waiting, now

    def record_answer(self, tokens: int) -> None:
        """Counts an answer that ended with `tokens` tokens."""
        if self._answer_tokens is None:
            self._answer_tokens = float(tokens)
        self._answer_tokens += (tokens - self._answer_tokens) * _LENGTH_WEIGHT

    def answer_tokens(self, most: int) -> int:
        """The expected length of an answer that may have at most `most` tokens."""
        return most if self._answer_tokens is None else min(most, round(self._answer_tokens))

    def seconds(self, tokens: float, now: float) -> float | None:
        """Estimated seconds to serve `tokens`; None: too few measurements."""
        elapsed = now - self._at if self._waiting else 0.0
        measured = self._seconds + elapsed
        if measured < _MIN_SECONDS or not self._tokens or self._answer_tokens is None:
            return None
        return tokens * measured / self._tokens
