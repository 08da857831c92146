"""The order of waiting generations: higher priority first, and at equal priority the key that was
served least, by the Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), one for each priority. Uses no clock and no network, so that fairness can be
tested as arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One requested generation, compared by identity."""

    key: str
    weight: float  # of its key, relative to the other keys'
    priority: int
    tokens: int  # of the prompt and, estimated, of the answer


class FairQueue:
    """Waiting claims, and the tokens that keys were served for claims that were popped."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}  # by priority

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    @property
    def waiting_tokens(self) -> Mapping[str, int]:
        """The tokens of waiting claims, by key; can be read from any thread."""
        tokens: dict[str, int] = {}
        for level in [*self._levels.values()]:
            for key, backlog in [*level.backlogs.items()]:
                tokens[key] = tokens.get(key, 0) + backlog
        return tokens

    def push(self, claim: Claim) -> None:
        self._levels.setdefault(claim.priority, _Level()).push(claim)

    def pop(self) -> Claim:
        """Removes and returns the next claim; IndexError if none waits. Call `end` for it later."""
        waiting = [priority for priority, level in self._levels.items() if len(level)]
        if not waiting:
            raise IndexError("no claim waits")
        return self._levels[max(waiting)].pop()

    def remove(self, claim: Claim) -> None:
        """Drops a waiting claim."""
        self._levels[claim.priority].remove(claim)
        self._forget_if_idle(claim.priority)

    def charge(self, claim: Claim, tokens: int) -> None:
        """Counts tokens that a popped claim was served; negative ones are refunded."""
        self._levels[claim.priority].charge(claim, tokens)

    def end(self, claim: Claim) -> None:
        """Ends a popped claim."""
        self._levels[claim.priority].running -= 1
        self._forget_if_idle(claim.priority)

    def tokens_ahead(self, key: str, weight: float, priority: int) -> float:
        """Tokens of waiting claims that are served before a claim that `key` would push now."""
        higher = sum(
            sum(level.backlogs.values()) for each, level in self._levels.items() if each > priority
        )
        level = self._levels.get(priority)
        return higher + (level.tokens_ahead(key, weight) if level else 0)

    def _forget_if_idle(self, priority: int) -> None:
        # Counters are relative: they mean nothing once no key competes.
        level = self._levels[priority]
        if not len(level) and not level.running:
            del self._levels[priority]


class _Level:
    """Claims of one priority."""

    def __init__(self) -> None:
        self.running = 0
        self.backlogs: dict[str, int] = {}  # tokens of waiting claims, by key
        self._waiting: dict[str, dict[Claim, None]] = {}  # by key, each in order of arrival
        self._served: dict[str, float] = {}  # the counters: tokens / weight, by key
        self._weights: dict[str, float] = {}
        self._last_key = ""  # the last to have no more waiting claims

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, claim: Claim) -> None:
        key = claim.key
        if key not in self._waiting:
            self._served[key] = self._lifted(key)
            self._waiting[key] = {}
            self.backlogs[key] = 0
        self._weights[key] = claim.weight
        self._waiting[key][claim] = None
        self.backlogs[key] += claim.tokens

    def pop(self) -> Claim:
        key = min(self._waiting, key=self._served.__getitem__)
        claim = next(iter(self._waiting[key]))
        self.remove(claim)
        self.running += 1
        return claim

    def remove(self, claim: Claim) -> None:
        key = claim.key
        del self._waiting[key][claim]
        self.backlogs[key] -= claim.tokens
        if not self._waiting[key]:
            del self._waiting[key], self.backlogs[key]
            self._last_key = key

    def charge(self, claim: Claim, tokens: int) -> None:
        self._served[claim.key] += tokens / claim.weight

    def tokens_ahead(self, key: str, weight: float) -> float:
        """The fluid limit: while `key` is served its backlog, every other key catches up."""
        own = self.backlogs.get(key, 0)
        until = self._lifted(key) + own / weight
        others = (
            min(backlog, max(0.0, until - self._served[other]) * self._weights[other])
            for other, backlog in self.backlogs.items()
            if other != key
        )
        return own + sum(others)

    def _lifted(self, key: str) -> float:
        """The counter of a waiting key, or the one that an idle key would get if it pushed now.

        An idle key keeps no credit: its counter is raised to the lowest among the waiting keys.
        """
        served = self._served.get(key, 0.0)
        if key in self._waiting:
            return served
        if self._waiting:
            return max(served, min(self._served[other] for other in self._waiting))
        return max(served, self._served.get(self._last_key, 0.0))
