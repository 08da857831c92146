"""Whether all contenders compute the same function, before anybody's speed is compared.

Equal tokens would be too much to ask: two tokens may be equally probable up to rounding. So every
contender writes a greedy answer, and Chasqui's float32 engine, which tests hold to Meta's code,
says how much less probable each token was than the best one. A wrong permutation or a missing norm
costs several units of logprob, rounding next to nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROMPT_TOKENS = 24
ANSWER_TOKENS = 12
# Of logprob, by precision. Quantized weights are another function: reported, not judged.
TOLERANCES = {"float32": 0.01, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the reference says of one contender's answer."""

    contender: str
    answer: tuple[int, ...]
    worst_shortfall: float  # logprob
    tolerance: float | None  # None: not judged

    @property
    def same(self) -> bool:
        return self.tolerance is None or self.worst_shortfall <= self.tolerance


def judge(
    contender: str, precision: str, answer: Sequence[int], shortfalls: Sequence[float]
) -> Verdict:
    """Raises ValueError unless there is a shortfall per token."""
    if len(answer) != ANSWER_TOKENS or len(shortfalls) != len(answer):
        raise ValueError(f"{contender} answered {len(answer)} tokens, not {ANSWER_TOKENS}")
    return Verdict(contender, tuple(answer), max(shortfalls), TOLERANCES.get(precision))


def describe(verdict: Verdict) -> Mapping[str, str | float | bool | None]:
    """For a result table."""
    words = "same" if verdict.same else "DIFFERENT"
    return {
        "contender": verdict.contender,
        "verdict": "not judged" if verdict.tolerance is None else words,
        "worst_shortfall_logprob": verdict.worst_shortfall,
        "tolerance": verdict.tolerance,
    }
