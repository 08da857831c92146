"""Room in the queue, shared by keys. As long as there is room, any key may take all of it. When it
is full, a request that keeps its key within its share displaces waiting requests of keys that have
more than theirs. Knows no clock and no network, so that fairness can be tested as arithmetic.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Holding:
    """A request's part of the room."""

    key: str
    weight: float  # its key's, relative to the other keys'
    priority: int
    begun: bool = False  # a replica was given one of its generations, so it is not displaced


class SharedRoom:
    """An amount of one thing (sequences, or tokens) that all requests together may hold.

    Requests that have begun are never displaced. They do not keep another key from its share
    either, so as long as they last more than the bound may be held. Requests that have not begun
    never hold more than the bound.
    """

    def __init__(self, bound: int | None) -> None:
        """None is without a bound."""
        self.bound = bound
        self.used = 0
        self._amounts: dict[Holding, int] = {}  # in order of arrival
        self._used_by_key: dict[str, int] = {}
        self._weights: dict[str, float] = {}  # of the keys that hold anything

    def used_by(self, key: str) -> int:
        return self._used_by_key.get(key, 0)

    def amount(self, holding: Holding) -> int:
        return self._amounts.get(holding, 0)

    def shares(self, key: str, weight: float) -> Mapping[str, float] | None:
        """The bound divided by weight among `key` and all keys that hold anything; None if there
        is no bound.
        """
        if self.bound is None:
            return None
        weights = self._weights | {key: weight}
        unit = self.bound / sum(weights.values())
        return {each: weight * unit for each, weight in weights.items()}

    def reserve(self, holding: Holding, amount: int) -> None:
        """Holds `amount` more, whether there is room or not."""
        if not amount:
            return
        self.used += amount
        self._amounts[holding] = self.amount(holding) + amount
        self._used_by_key[holding.key] = self.used_by(holding.key) + amount
        self._weights[holding.key] = holding.weight

    def release(self, holding: Holding) -> None:
        """Gives back all that a request holds, if anything."""
        amount = self._amounts.pop(holding, 0)
        if not amount:
            return
        self.used -= amount
        self._used_by_key[holding.key] -= amount
        if not self._used_by_key[holding.key]:
            del self._used_by_key[holding.key], self._weights[holding.key]

    def displaced_by(self, newcomer: Holding, amount: int) -> list[Holding] | None:
        """The room to free so that `newcomer` may take `amount`; None if it may not.

        The key with the most waiting for its weight loses first: its lowest priority, and of that
        the newest request. No request displaces one of higher priority, which would be served
        before it.
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
            # If nothing of higher priority waits there is one: what does not fit is above a share.
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
        """The room of other keys' requests that have not begun, by key; and those of them that
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
