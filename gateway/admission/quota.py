"""One thing that requests take of the queue, sequences or tokens, and what a request is told that
does not get it.
"""

import math
from dataclasses import dataclass

from gateway.admission.fair_share import Holding, SharedRoom


@dataclass(frozen=True, slots=True)
class Quota:
    """Room for all requests, and the words for it."""

    room: SharedRoom
    unit: str
    asks: str  # what a request does that wants some
    setting: str  # of its bound

    def never_fits(self, amount: int, bound: int, whose: str) -> str:
        return (
            f"the request {self.asks} {amount} {self.unit}, and all requests{whose} together "
            f"{bound}: ask for fewer answers, or shorter ones"
        )

    def key_is_full(self, holding: Holding, amount: int, bound: int) -> str:
        used = f"{self.room.used_by(holding.key)} of {bound} {self.unit} of this key"
        return f"the queue is full: {used} run or wait, and the request {self.asks} {amount}"

    def is_full(self, holding: Holding, amount: int) -> str:
        used = f"{self.room.used} of {self.room.bound} {self.unit}"
        asks = f"the request {self.asks} {amount}{self._share(holding, holding)}"
        return f"the queue is full: {used} run or wait, and {asks}"

    def displaced(self, holding: Holding, newcomer: Holding) -> str:
        used = f"{self.room.used_by(holding.key)} of {self.room.bound} {self.unit}"
        return (
            "the queue was full, and a request of another key took the place of this one: this "
            f"request's key had {used}{self._share(holding, newcomer)}"
        )

    def _share(self, holding: Holding, newcomer: Holding) -> str:
        """The share of a request's key when `newcomer` asks, if it is not alone."""
        shares = self.room.shares(newcomer.key, newcomer.weight)
        if shares is None or len(shares) == 1:
            return ""
        return f"; the key's share is {math.floor(shares[holding.key])}"
