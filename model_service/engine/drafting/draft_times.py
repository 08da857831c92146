"""How long the draft model takes: for one draft of each sequence, and for tokens of backlogs."""

from collections import deque
from statistics import median

WINDOW = 9  # times whose median counts
# A forward pass with fewer tokens besides its rows says nothing about the time of a token.
MIN_BACKLOG = 8


class DraftTimes:
    """The times of the model's last forward passes, sampling included."""

    def __init__(self) -> None:
        # By the magnitude of the number of rows.
        self._rounds: dict[int, deque[float]] = {}
        self._per_token: deque[float] = deque(maxlen=WINDOW)

    def record(self, rows: int, tokens: int, seconds: float) -> None:
        """Records a forward pass.

        Args:
            rows: sequences in it.
            tokens: all of its tokens; each sequence has one or two, or a part of its backlog.
            seconds: that it took.
        """
        extra = tokens - 2 * rows
        if extra <= 0:
            self._rounds.setdefault(rows.bit_length(), deque(maxlen=WINDOW)).append(seconds)
        elif extra >= MIN_BACKLOG and (usual := self.round_seconds(rows)) is not None:
            self._per_token.append(max(0.0, seconds - usual) / extra)

    def round_seconds(self, rows: int) -> float | None:
        """The time of one draft for each of `rows` sequences; None before the first."""
        if not self._rounds:
            return None
        # A magnitude that was not measured takes about as long as the next one.
        nearest = min(self._rounds, key=lambda magnitude: abs(magnitude - rows.bit_length()))
        return median(self._rounds[nearest])

    def token_seconds(self) -> float:
        """The time of one token of a backlog; 0 before the first."""
        return median(self._per_token) if self._per_token else 0.0
