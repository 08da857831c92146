"""Room in the queue, shared by API keys. While there is room, one key may take all of it. When it
is full, a request that keeps its key within its share displaces waiting requests of keys above
theirs. Uses no clock and no network, so that fairness can be tested as arithmetic.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Holding:
    """The room that one request holds."""

    key: str
    weight: float  # of its key, relative to the other keys'
    priority: int
    begun: bool = False  # one of its generations was given to a replica, so it is not displaced


class SharedRoom:
    """A bounded amount of sequences or tokens that requests hold.

    Requests that have begun are never displaced, and another key gets its share all the same: until
    they end, the total may exceed the bound. Requests that have not begun never exceed it.
    """

    def __init__(self, bound: int | None) -> None:
        """`bound` is None for no limit."""
        self.bound = bound
        self.used = 0
        self._amounts: dict[Holding, int] = {}  # in order of arrival
        self._used_by_key: dict[str, int] = {}
        self._weights: dict[str, float] = {}  # of the keys that hold room

    def used_by(self, key: str) -> int:
        return self._used_by_key.get(key, 0)

    def amount(self, holding: Holding) -> int:
        return self._amounts.get(holding, 0)

    def shares(self, key: str, weight: float) -> Mapping[str, float] | None:
        """The bound divided by weight among `key` and all keys that hold room; None: no bound."""
        if self.bound is None:
            return None
        weights = self._weights | {key: weight}
        unit = self.bound / sum(weights.values())
        return {each: weight * unit for each, weight in weights.items()}

    def reserve(self, holding: Holding, amount: int) -> None:
        """Adds `amount` to what a request holds, without checking for room."""
        if not amount:
            return
        self.used += amount
        self._amounts[holding] = self.amount(holding) + amount
        self._used_by_key[holding.key] = self.used_by(holding.key) + amount
        self._weights[holding.key] = holding.weight

    def release(self, holding: Holding) -> None:
        """Frees all room that a request holds."""
        amount = self._amounts.pop(holding, 0)
        if not amount:
            return
        self.used -= amount
        self._used_by_key[holding.key] -= amount
        if not self._used_by_key[holding.key]:
            del self._used_by_key[holding.key], self._weights[holding.key]

    def displaced_by(self, newcomer: Holding, amount: int) -> list[Holding] | None:
        """The requests to displace so that `newcomer` gets `amount`; None: refuse it.

        The key with the most waiting room per weight loses first: the newest request of its lowest
        priority. No request displaces one of higher priority, which would be served before it.
        """
        shares = self.shares(newcomer.key, newcomer.weight)
        if self.bound is None or shares is None or self.used + amount <= self.bound:
            return []
        own = self.used_by(newcomer.key) + amount
        if own > shares[newcomer.key]:
            return None
        waiting, candidates = self._waiting_of_others(newcomer)
        surplus = own + sum(waiting.values()) - self.bound
        displaced: list[Holding] = []
        while surplus > 0:
            # Empty only if higher priorities wait: else a surplus puts some key above its share.
            larger = [key for key in candidates if candidates[key] and waiting[key] > shares[key]]
            if not larger:
                return None
            largest = max(larger, key=lambda key: waiting[key] / self._weights[key])
            displaced.append(candidates[largest].pop())
            waiting[largest] -= self.amount(displaced[-1])
            surplus -= self.amount(displaced[-1])
        return displaced

    def _waiting_of_others(
        self, newcomer: Holding
    ) -> tuple[dict[str, int], dict[str, list[Holding]]]:
        """By other key: the room of requests that have not begun, and those of these requests that
        `newcomer` may displace, the first to go at the end.
        """
        waiting: defaultdict[str, int] = defaultdict(int)
        candidates: defaultdict[str, list[Holding]] = defaultdict(list)
        for holding in self._not_begun():
            if holding.key != newcomer.key:
                waiting[holding.key] += self.amount(holding)
                if holding.priority <= newcomer.priority:
                    candidates[holding.key].append(holding)
        for holdings in candidates.values():
            holdings.sort(key=lambda holding: holding.priority, reverse=True)
        return waiting, candidates

    def _not_begun(self) -> Iterator[Holding]:
        return (holding for holding in self._amounts if not holding.begun)
