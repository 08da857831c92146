"""Speculation: drafts the next tokens of a sequence, so that one step may make several.

A draft is checked in the step that computes it: it is accepted if it is the token that sampling
draws there. So drafts change how fast an answer comes, and its tokens only by rounding: the number
of rows in a step changes the last bits of the logits. This module decides whether drafts are worth
it: each costs a row of the step, and an accepted one saves its sequence a whole step.
"""

import math
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Protocol

from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.sequence import Sequence

# Share of its weight that an observation keeps when another comes.
MEMORY = 0.9
# Cost of a draft, in tokens, until steps of different size have been recorded.
DEFAULT_COST = 0.1


class Drafter(Protocol):
    """A source of drafts; a small model could be another one."""

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may follow the sequence's last one."""

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""


@dataclass(slots=True)
class _Acceptance:
    """The share of accepted drafts of one sequence; the latest count most."""

    right: float = 1.0
    drafted_weight: float = 2.0
    drafts: list[int] = field(default_factory=list)  # for the next step

    def observe(self, *, right: bool) -> None:
        self.right = MEMORY * self.right + right
        self.drafted_weight = MEMORY * self.drafted_weight + 1

    def worthwhile(self, cost: float) -> float:
        """The number of drafts that each make, on average, more than `cost` tokens."""
        chance = self.right / self.drafted_weight
        if chance <= cost:
            return 0.0
        # The i-th draft counts only if all before it are right, too.
        return math.log(cost) / math.log(chance) if chance < 1 else math.inf


class Speculation:
    """Proposes drafts, and learns for which sequences they are worth their cost."""

    def __init__(self, drafter: Drafter, prefill_budget: PrefillBudget, most: int) -> None:
        """Proposes at most `most` tokens for a sequence in a step; 0 turns it off."""
        self._drafter = drafter
        self._prefill_budget = prefill_budget
        self._most = most
        self._acceptance: dict[Sequence, _Acceptance] = {}
        self.drafted = 0  # tokens, since the start
        self.accepted = 0

    def propose(self, sequence: Sequence, room: int, decode_rows: int) -> list[int]:
        """Tokens to compute behind the sequence's last one.

        Drafts that are not worth computing are made, too, and compared with the tokens that come:
        so speculation finds out at no cost when it would pay again.

        Args:
            sequence: that decodes.
            room: most tokens that it may take.
            decode_rows: sequences that decode in the step.
        """
        cost = self._cost(decode_rows)
        if cost >= 1 or not self._most:
            return []
        acceptance = self._acceptance.setdefault(sequence, _Acceptance())
        acceptance.drafts = self._drafter.propose(sequence, self._most)
        return acceptance.drafts[: int(min(room, acceptance.worthwhile(cost)))]

    def learn(self, sequence: Sequence, drafts: Tokens[int], made: Tokens[int]) -> None:
        """Compares the step's drafts with the tokens that it made for the sequence."""
        if (acceptance := self._acceptance.get(sequence)) is None:
            return
        for draft, token in zip(acceptance.drafts, made, strict=False):
            acceptance.observe(right=draft == token)
        acceptance.drafts = []
        self.drafted += len(drafts)
        self.accepted += max(0, min(len(drafts), len(made) - 1))

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""
        self._drafter.forget(sequence)
        self._acceptance.pop(sequence, None)

    def _cost(self, decode_rows: int) -> float:
        """The cost of a draft, in tokens that the step would make in the same time."""
        cost = self._prefill_budget.cost(decode_rows)
        return DEFAULT_COST if cost is None else cost * decode_rows
