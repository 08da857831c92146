"""The number of drafts for each sequence of a step that makes most tokens per second.

The i-th draft of a sequence makes a token if it and all before it are right, which has the chance
`chance ** i`. So each further draft is worth less than the one before, while it costs the same, and
the rate has a single maximum (Leviathan et al., "Fast inference from transformers via speculative
decoding", 2023, section 3.5, for one sequence).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Rate(NamedTuple):
    """The tokens that a step makes on average, and its time in steps without drafts."""

    tokens: float
    time: float

    @property
    def per_step(self) -> float:
        """Tokens in the time of a step without drafts."""
        return self.tokens / self.time


def draft_lengths(
    chances: Sequence[float],
    rooms: Sequence[int],
    without: Rate,
    *,
    row_cost: float,
    round_cost: float = 0.0,
    longest: float = float("inf"),
    everyone: int = 0,
) -> tuple[list[int], Rate]:
    """The best number of drafts for each of some sequences, and the step's rate with them.

    Args:
        chances: that a draft is right, by sequence.
        rooms: most drafts, by sequence.
        without: the step without these drafts.
        row_cost: time of a step to check one draft.
        round_cost: time to make one draft for any number of sequences.
        longest: time of all rounds beyond which no sequence of the step may wait for others'.
        everyone: how many sequences the step has.
    """
    lengths, rate = [0] * len(chances), without
    for drafted in range(max(rooms, default=0)):
        going_on = [i for i, length in enumerate(lengths) if length == drafted < rooms[i]]
        going_on.sort(key=lambda i: -chances[i])
        tokens, time, best, count = rate.tokens, rate.time + round_cost, rate, 0
        for number, i in enumerate(going_on, 1):
            tokens, time = tokens + chances[i] ** (drafted + 1), time + row_cost
            if tokens / time > best.per_step:
                best, count = Rate(tokens, time), number
        if not count or (count < everyone and (drafted + 1) * round_cost > longest):
            break
        rate = best
        for i in going_on[:count]:
            lengths[i] += 1
    return lengths, rate
