"""The cost of checking a draft, learned from steps with drafts and without prompts.

A prompt token costs less. A draft's row has logits, from which a token is drawn.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 9  # observations whose median counts
LEAST = 3  # of them, because a first step of a kind takes far longer than the others
MIN_COST = 1e-6  # steps, if noise hides the cost
# Proposals without a new observation after which the oldest is forgotten: a cost that was measured
# too high would otherwise keep drafts from being made, and so from being measured again.
FORGET_AFTER = 64


@dataclass(slots=True)
class _Observed:
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    unobserved: int = 0  # proposals since the last observation


class RowCosts:
    """The time of a draft's row over that of the step without drafts, by the magnitude of rows."""

    def __init__(self) -> None:
        self._observed: dict[int, _Observed] = {}

    def record(self, rows: int, drafted: int, ratio: float) -> None:
        """Records a step of `rows` sequences that took `ratio` times as long as without drafts."""
        observed = self._observed.setdefault(rows.bit_length(), _Observed())
        observed.costs.append((ratio - 1) / drafted)
        observed.unobserved = 0

    def cost(self, rows: int) -> float | None:
        """The cost for the next proposal; None if none is known, or not any more."""
        observed = self._observed.get(rows.bit_length())
        if observed is None or len(observed.costs) < LEAST:
            return None
        observed.unobserved += 1
        if observed.unobserved % FORGET_AFTER == 0:
            observed.costs.popleft()
        return max(median(observed.costs), MIN_COST)
