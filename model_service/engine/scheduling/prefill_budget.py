"""How many prompt tokens a step may take while others stream, learned from how long steps take.

Pure arithmetic over what `record` is told: no clock, and no influence on any token. The model is
seconds = base × (1 + cost × prompt tokens), fitted apart for each magnitude of decoding rows; only
`cost` decides, so a machine that slows down as a whole changes nothing.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

# Steps that a fit looks at: those with prompt tokens, and of those without so many that two strange
# ones among them do no harm.
WINDOW, DECODE_ONLY_WINDOW = 16, 5
FITS = 5  # whose median decides: one strange step among plain ones makes one strange fit
# A line needs two abscissae, and what a step takes without prompts changes with the machine: while
# prompts are computed, every so many steps take none of their tokens.
CONTRAST_EVERY = 8
# Prompt tokens that the other steps take however much they cost, so that prompts get on.
FLOOR = 4
MIN_COST = 1e-6  # decode-only steps per prompt token: where noise hides the cost


@dataclass(slots=True)
class _Regime:
    """What is known of steps with about the same number of decoding rows."""

    # Prompt tokens and seconds of steps; bare ones have none.
    with_prefill: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    decode_only: deque[tuple[int, float]] = field(
        default_factory=lambda: deque(maxlen=DECODE_ONLY_WINDOW)
    )
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=FITS))
    tried: deque[int] = field(default_factory=lambda: deque(maxlen=FITS))  # prompt tokens
    since_contrast: int = CONTRAST_EVERY


class PrefillBudget:
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
        steps = regime.with_prefill if prompt_tokens else regime.decode_only
        steps.append((prompt_tokens, seconds))
        if prompt_tokens:
            regime.tried.append(prompt_tokens)
            if (cost := _relative_cost([*regime.decode_only, *regime.with_prefill])) is not None:
                regime.costs.append(cost)

    def cost(self, decode_rows: int) -> float | None:
        """What a further token adds to a step, in steps in which `decode_rows` sequences decode."""
        costs = self._regime(decode_rows).costs
        return max(median(costs), MIN_COST) if costs else None

    def prompt_budget(self, decode_rows: int) -> int:
        """The most prompt tokens for a step in which `decode_rows` sequences decode.

        0 from time to time, until a step without any has been recorded.
        """
        if not decode_rows:
            return self._ceiling
        regime = self._regime(decode_rows)
        return 0 if regime.since_contrast >= CONTRAST_EVERY else self._usual(regime)

    def _regime(self, decode_rows: int) -> _Regime:
        return self._regimes.setdefault(decode_rows.bit_length(), _Regime())

    def _usual(self, regime: _Regime) -> int:
        """What the stall allows, but never more than twice what was lately tried."""
        known = 2 * max(regime.tried) if regime.tried else self._first
        if regime.costs:
            cost = max(median(regime.costs), MIN_COST)
            known = min(known, int((self._max_stall - 1) / cost))
        return max(self._floor, min(known, self._ceiling))


def _relative_cost(points: list[tuple[int, float]]) -> float | None:
    """Seconds per prompt token over seconds without any; None without two different numbers.

    The line's slope is the median of those between all pairs of points (Sen, "Estimates of the
    regression coefficient based on Kendall's tau", 1968), each as heavy as its points are far apart
    (Sievers, "Weighted rank statistics for simple linear regression", 1978): most steps of a long
    prompt take about the same number of tokens, and between those noise alone makes the slope.
    """
    slopes = sorted(
        ((seconds - other_seconds) / (tokens - other_tokens), abs(tokens - other_tokens))
        for index, (tokens, seconds) in enumerate(points)
        for other_tokens, other_seconds in points[:index]
        if tokens != other_tokens
    )
    if not slopes:
        return None
    weights = list(accumulate(weight for _, weight in slopes))
    slope, _ = slopes[bisect_left(weights, weights[-1] / 2)]
    base = median(seconds - slope * tokens for tokens, seconds in points)
    # The line's start can only be wrong when it says that prompts alone take all the time.
    return slope / base if base > 0 else None
