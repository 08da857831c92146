"""Guesses the next tokens of a sequence, so that one step may make several.

A guess is checked in the step that computes it: it stands exactly when it is the token that
sampling draws there. So guesses change how fast an answer comes; its tokens only in so far as the
number of rows in a step changes the last bits of the logits. Here is decided whether they are worth
it: a guess costs a row of the step, a right one saves its sequence a whole step.
"""

import math
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Protocol

from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.sequence import Sequence

NGRAM = 3  # tokens that must have stood together before
# Share of its weight that an observation keeps when another comes.
MEMORY = 0.9
# Cost of a guess, in tokens, until the pace has seen steps of different size.
UNKNOWN_COST = 0.1


class Drafter(Protocol):
    """Where guesses come from; a small model could be another source."""

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` tokens that may follow the sequence's last; none if it knows none."""

    def forget(self, sequence: Sequence) -> None:
        """Drops what it holds for a sequence that has ended."""


@dataclass(slots=True)
class _Index:
    """Where each n-gram of a text was last followed by something."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    end: int = NGRAM  # the next follower to be entered


class NgramDrafter:
    """What followed the last n-gram when it last stood in the sequence's own text.

    Prompt lookup decoding (Saxena, 2023): answers repeat names, quotations and lists of their
    prompts. What would reach past the text's end goes round: a repetition goes on repeating.
    """

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        tokens = sequence.tokens
        index = self._indices.setdefault(sequence, _Index())
        for follower in range(index.end, len(tokens)):
            index.followers[tuple(tokens[follower - NGRAM : follower])] = follower
        index.end = max(index.end, len(tokens))
        begin = index.followers.get(tuple(tokens[-NGRAM:]))
        if begin is None:
            return []
        following = tokens[begin : begin + most]
        while len(following) < most:
            following += following[: most - len(following)]
        return following

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)


@dataclass(slots=True)
class _Trust:
    """How often guesses for one sequence were right, the latest counting most."""

    right: float = 1.0
    guessed: float = 2.0
    guesses: list[int] = field(default_factory=list)  # for the step under way

    def observe(self, *, right: bool) -> None:
        self.right = MEMORY * self.right + right
        self.guessed = MEMORY * self.guessed + 1

    def worthwhile(self, cost: float) -> float:
        """How many guesses each make, on average, more than `cost` tokens."""
        chance = self.right / self.guessed
        if chance <= cost:
            return 0.0
        # The i-th guess counts if all before it are right, too.
        return math.log(cost) / math.log(chance) if chance < 1 else math.inf


class Speculation:
    """Proposes drafts, and learns for which sequences they are worth their cost."""

    def __init__(self, drafter: Drafter, prefill_budget: PrefillBudget, most: int) -> None:
        """Proposes up to `most` tokens for a sequence in a step; 0: never any."""
        self._drafter = drafter
        self._prefill_budget = prefill_budget
        self._most = most
        self._trust: dict[Sequence, _Trust] = {}
        self.drafted = 0  # tokens, since the start
        self.accepted = 0

    def propose(self, sequence: Sequence, room: int, decode_rows: int) -> list[int]:
        """Tokens to compute behind the sequence's last one.

        Also what is not worth computing is guessed, and compared with what comes: so speculation
        finds out at no cost when it would pay again.

        Args:
            sequence: that decodes.
            room: most tokens that it may take.
            decode_rows: sequences that decode in the step.
        """
        cost = self._cost(decode_rows)
        if cost >= 1 or not self._most:
            return []
        trust = self._trust.setdefault(sequence, _Trust())
        trust.guesses = self._drafter.propose(sequence, self._most)
        return trust.guesses[: int(min(room, trust.worthwhile(cost)))]

    def learn(self, sequence: Sequence, drafts: Tokens[int], made: Tokens[int]) -> None:
        """Compares the step's guesses with the tokens that it made for the sequence."""
        if (trust := self._trust.get(sequence)) is None:
            return
        for guess, token in zip(trust.guesses, made, strict=False):
            trust.observe(right=guess == token)
        trust.guesses = []
        self.drafted += len(drafts)
        self.accepted += max(0, min(len(drafts), len(made) - 1))

    def forget(self, sequence: Sequence) -> None:
        """Drops what is held for a sequence that has ended."""
        self._drafter.forget(sequence)
        self._trust.pop(sequence, None)

    def _cost(self, decode_rows: int) -> float:
        """Of a guess, in tokens that the step would make in the time it takes."""
        cost = self._prefill_budget.cost(decode_rows)
        return UNKNOWN_COST if cost is None else cost * decode_rows
