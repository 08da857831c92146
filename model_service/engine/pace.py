"""How many prompt tokens a step may take while others stream, learned from how long steps take.

Pure arithmetic over what `record` is told: no clock, and no influence on any token. The model is
seconds = base × (1 + cost × prompt tokens), fitted apart for each magnitude of decoding rows; only
`cost` decides, so a machine that slows down as a whole changes nothing.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 24  # steps that a fit looks at
FITS = 5  # whose median decides: one strange step among plain ones makes one strange fit
# A line needs two abscissae. Where neither decode alone nor prompts of other lengths give a second,
# every so many steps take another number of prompt tokens on purpose.
CONTRAST_EVERY = 8
# Prompt tokens that steps take however much they cost, so that prompts get on; half as many where
# that is the other number tried on purpose.
FLOOR = 4
LEAST_COST = 1e-6  # decode-only steps per prompt token: where noise hides the cost


@dataclass(slots=True)
class _Regime:
    """What is known of steps with about the same number of decoding rows."""

    steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=FITS))
    tried: deque[int] = field(default_factory=lambda: deque(maxlen=FITS))  # prompt tokens
    since_contrast: int = CONTRAST_EVERY


class Pace:
    """Keeps steps below `max_stall` times a step without prompts."""

    def __init__(self, max_stall: float, first: int, ceiling: int) -> None:
        """Starts knowing nothing: with `first`, doubling as steps are recorded.

        Args:
            max_stall: longest step while sequences decode, in steps without prompt tokens; above 1.
            first: prompt tokens of the first step that has some.
            ceiling: most prompt tokens of a step; where it is lower than FLOOR, it counts.
        """
        self._max_stall = max_stall
        self._floor = min(FLOOR, ceiling)
        self._first = first
        self._ceiling = ceiling
        self._regimes: dict[int, _Regime] = {}

    def record(self, decode_rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learns from a step; one in which nothing decoded stalled nobody, and says nothing."""
        if not decode_rows:
            return
        regime = self._regime(decode_rows)
        usual = self._usual(regime)
        contrasts = 3 * abs(prompt_tokens - usual) >= usual
        regime.since_contrast = 0 if contrasts else regime.since_contrast + 1
        regime.steps.append((prompt_tokens, seconds))
        if prompt_tokens:
            regime.tried.append(prompt_tokens)
            if (cost := _relative_cost(regime.steps)) is not None:
                regime.costs.append(cost)

    def cost(self, decode_rows: int) -> float | None:
        """What a further token adds to a step, in steps in which `decode_rows` sequences decode."""
        costs = self._regime(decode_rows).costs
        return max(median(costs), LEAST_COST) if costs else None

    def prompt_budget(self, decode_rows: int) -> int:
        """The most prompt tokens for a step in which `decode_rows` sequences decode."""
        if not decode_rows:
            return self._ceiling
        regime = self._regime(decode_rows)
        usual = self._usual(regime)
        if regime.since_contrast < CONTRAST_EVERY:
            return usual
        return self._floor if 2 * usual > 3 * self._floor else max(1, self._floor // 2)

    def _regime(self, decode_rows: int) -> _Regime:
        return self._regimes.setdefault(decode_rows.bit_length(), _Regime())

    def _usual(self, regime: _Regime) -> int:
        """What the stall allows, but never more than twice what was lately tried."""
        known = 2 * max(regime.tried) if regime.tried else self._first
        if regime.costs:
            cost = max(median(regime.costs), LEAST_COST)
            known = min(known, int((self._max_stall - 1) / cost))
        return max(self._floor, min(known, self._ceiling))


def _relative_cost(steps: deque[tuple[int, float]]) -> float | None:
    """Seconds per prompt token over seconds without any; None without two different numbers.

    The line is Theil and Sen's: the median of the slopes between all pairs of points, which stays
    near the truth while fewer than 29 % of the points are wrong (Sen, "Estimates of the regression
    coefficient based on Kendall's tau", 1968).
    """
    points = list(steps)
    slopes = [
        (seconds - other_seconds) / (tokens - other_tokens)
        for index, (tokens, seconds) in enumerate(points)
        for other_tokens, other_seconds in points[:index]
        if tokens != other_tokens
    ]
    if not slopes:
        return None
    slope = median(slopes)
    base = median(seconds - slope * tokens for tokens, seconds in points)
    # The line's start can only be wrong when it says that prompts alone take all the time.
    return slope / base if base > 0 else None
