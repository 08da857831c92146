"""The number of prompt tokens in a step while streams run, learned from the times of steps.

The model is seconds = base × (1 + cost × prompt tokens), fitted separately for each magnitude of
decoding rows. Only `cost` decides, so a machine that slows down as a whole changes nothing. There
is no clock here, and no influence on any token.

Other engines use a fixed budget, which suits one model on one machine. Measured with the stall case
of `bench.engine` (110M parameters, two CPU cores, 8 streams, a prompt of 800 tokens, max_stall 1.7;
two rounds each in float32 and int8, the budget replaced by a constant): the median step was 1.7 to
1.8 times as long as one without prompts, and the prompt's first token came after 1.9 to 2.3 s. A
fixed budget of 8 gave 1.2 to 1.3 times and 4.7 to 7.5 s; 32 gave 1.7 to 2.0 times and 1.8 to 4.6 s;
128 gave 3.4 to 5.0 times and 0.7 to 4.3 s.

If decode-only steps are recorded graphs, a step with prompt tokens is launched in pieces, or kernel
by kernel if it is large, and takes as long as that, however few tokens it has. One line through all
kinds would make each token carry that time, and the budget would fall to nothing. So decode-only
steps are fitted apart: the cost is what a step with prompts adds to the median of the graphs. If
its launch alone takes longer than `max_stall` allows, it gets as many tokens as the launch hides:
more each time, until the step takes longer than its launch. A step in pieces is not enlarged to one
that is launched kernel by kernel if that launch takes longer than `max_stall` allows.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

# Numbers of steps in a fit: with prompt tokens, and without. Two outliers among the latter do no
# harm.
WINDOW, DECODE_ONLY_WINDOW = 16, 5
FITS = 5  # whose median decides, because one outlier makes one wrong fit
BASES = 9  # times of steps without prompts whose median counts
# A line needs two abscissae, and the time of a step without prompts changes with the machine: so
# while prompts are computed, one step in this many takes none of their tokens.
CONTRAST_EVERY = 8
# Prompt tokens that the other steps take whatever they cost, so that prompts advance.
FLOOR = 4
# With recorded graphs: a step whose launch takes longer than `max_stall` allows may take that much
# longer than the launch. Up to half of it, more tokens are tried: by one sixteenth and one.
LAUNCH_MARGIN = 1 / 16
RECENT = 3  # of the costs, with recorded graphs; the highest counts
MIN_COST = 1e-6  # decode-only steps per prompt token, if noise hides the cost


@dataclass(slots=True)
class _Regime:
    """Observations of steps with about the same number of decoding rows."""

    # Prompt tokens and seconds of steps.
    with_prefill: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    decode_only: deque[tuple[int, float]] = field(
        default_factory=lambda: deque(maxlen=DECODE_ONLY_WINDOW)
    )
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=FITS))
    # Seconds of the last steps, less what their prompt tokens cost.
    bases: deque[float] = field(default_factory=lambda: deque(maxlen=BASES))
    tried: deque[int] = field(default_factory=lambda: deque(maxlen=FITS))  # prompt tokens
    # Prompt tokens of the last steps that took no longer than their launch, else 0.
    hidden: deque[int] = field(default_factory=lambda: deque(maxlen=FITS))
    since_contrast: int = CONTRAST_EVERY


class PrefillBudget:
    """Keeps steps below `max_stall` times a step without prompts."""

    def __init__(
        self, max_stall: float, first: int, ceiling: int, recorded_tokens: int | None = None
    ) -> None:
        """Starts with a budget of `first`, which doubles as steps are recorded.

        Args:
            max_stall: longest step while sequences decode, in steps without prompt tokens; above 1.
            first: prompt tokens of the first step that has some.
            ceiling: most prompt tokens of a step, also if it is lower than FLOOR.
            recorded_tokens: most tokens of a step with prompts that is replayed from graphs, in
                pieces; None if not even steps without prompts are.
        """
        self._recorded = recorded_tokens is not None
        self._recorded_tokens = recorded_tokens or 0
        # Seconds of the last launches of steps with prompts: in pieces, and kernel by kernel.
        self._in_pieces, self._by_kernel = (deque[float](maxlen=DECODE_ONLY_WINDOW) for _ in "pk")
        self.max_stall = max_stall
        self._floor = min(FLOOR, ceiling)
        self._first = first
        self._ceiling = ceiling
        self._regimes: defaultdict[int, _Regime] = defaultdict(_Regime)

    def record(
        self, decode_rows: int, prompt_tokens: int, seconds: float, launch: float = 0.0
    ) -> None:
        """Learns from a step, unless nothing decoded in it: then it stalled no stream.

        Args:
            decode_rows: sequences that decoded.
            prompt_tokens: of other sequences.
            seconds: that the step took.
            launch: seconds of the host's work for it, with recorded graphs.
        """
        if not decode_rows:
            return
        regime = self._regime(decode_rows)
        usual = self._usual(regime, decode_rows)
        # With recorded graphs, only steps without prompts tell the base.
        contrasts = not prompt_tokens or (
            not self._recorded and 3 * abs(prompt_tokens - usual) >= usual
        )
        regime.since_contrast = 0 if contrasts else regime.since_contrast + 1
        steps = regime.with_prefill if prompt_tokens else regime.decode_only
        steps.append((prompt_tokens, seconds))
        if prompt_tokens:
            regime.tried.append(prompt_tokens)
            if (cost := self._fitted_cost(regime)) is not None:
                regime.costs.append(cost)
            if self._recorded:
                in_pieces = decode_rows + prompt_tokens <= self._recorded_tokens
                launches = self._in_pieces if in_pieces else self._by_kernel
                launches.append(launch)
                in_launch = seconds <= (1 + LAUNCH_MARGIN / 2) * median(launches)
                regime.hidden.append(prompt_tokens if in_launch else 0)
        if regime.costs or not prompt_tokens:
            cost = max(median(regime.costs), MIN_COST) if prompt_tokens else 0.0
            regime.bases.append(seconds / (1 + cost * prompt_tokens))

    def step_seconds(self, decode_rows: int) -> float | None:
        """The time of a step of `decode_rows` sequences without prompts; None if unknown yet."""
        bases = self._regime(decode_rows).bases
        return median(bases) if bases else None

    def cost(self, decode_rows: int) -> float | None:
        """The time of one more token over that of a decode-only step of `decode_rows` sequences."""
        costs = self._regime(decode_rows).costs
        return max(median(costs), MIN_COST) if costs else None

    def prompt_budget(self, decode_rows: int) -> int:
        """The most prompt tokens for a step in which `decode_rows` sequences decode.

        0 from time to time, until a step without any has been recorded.
        """
        if not decode_rows:
            return self._ceiling
        regime = self._regime(decode_rows)
        return 0 if regime.since_contrast >= CONTRAST_EVERY else self._usual(regime, decode_rows)

    def _regime(self, decode_rows: int) -> _Regime:
        return self._regimes[decode_rows.bit_length()]

    def _usual(self, regime: _Regime, decode_rows: int) -> int:
        """The budget that the stall allows, at most twice the largest of the last steps."""
        known = 2 * max(regime.tried) if regime.tried else self._first
        in_pieces = self._recorded_tokens - decode_rows  # the most prompt tokens
        if in_pieces < self._floor:
            known = min(known, self._allowed(regime, self._by_kernel))
        elif (allowed := self._allowed(regime, self._in_pieces)) <= in_pieces:
            known = min(known, allowed)
        elif _stall(regime, self._by_kernel) > self.max_stall:
            known = min(known, in_pieces)
        else:
            known = min(known, max(in_pieces, self._allowed(regime, self._by_kernel)))
        return max(self._floor, min(known, self._ceiling))

    def _allowed(self, regime: _Regime, launches: deque[float]) -> int:
        """The most prompt tokens of a step whose launch takes as long as these."""
        if not regime.costs:
            return self._ceiling
        # A device's clock has hardly any noise, and a cost that is learned late is a stall.
        likely = max([*regime.costs][-RECENT:]) if self._recorded else median(regime.costs)
        longest = max(self.max_stall, _stall(regime, launches))
        allowed = int((longest - 1) / max(likely, MIN_COST))
        hidden = max(regime.hidden, default=0)
        return max(allowed, hidden + hidden // 16 + 1) if hidden else allowed

    def _fitted_cost(self, regime: _Regime) -> float | None:
        """The cost that the observations give; with recorded graphs, the last one alone."""
        if not self._recorded:
            return _relative_cost([*regime.decode_only, *regime.with_prefill])
        tokens, seconds = regime.with_prefill[-1]
        base = _decode_only_seconds(regime)
        return (seconds / base - 1) / tokens if base else None


def _stall(regime: _Regime, launches: deque[float]) -> float:
    """The time that such launches take, in decode-only steps; 0 if unknown."""
    base = _decode_only_seconds(regime)
    return (1 + LAUNCH_MARGIN) * median(launches) / base if launches and base else 0.0


def _decode_only_seconds(regime: _Regime) -> float:
    """The usual step without prompts; 0 if none is known."""
    return median([seconds for _, seconds in regime.decode_only] or [0.0])


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
    # A line that starts at or below 0 says that prompts take all the time, which is wrong.
    return slope / base if base > 0 else None
