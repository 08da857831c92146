"""The bounds of the queue, their quotas, and the error texts of requests above a quota."""

import math
from dataclasses import dataclass

from gateway.admission.fair_share import Holding, SharedRoom


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits on running and waiting generations, for all requests together; None: no limit."""

    max_sequences: int
    max_tokens: int | None = None  # prompt tokens plus max_gen_len
    max_running: int | None = None  # sequences at the replicas; None: from their batch capacity


@dataclass(frozen=True, slots=True)
class KeyQuota:
    """An API key's own quota at one moment."""

    unit: str  # sequences, or tokens
    limit: int  # that may run and wait at once
    remaining: int
    reset: float  # seconds until those that run and wait have probably ended


@dataclass(frozen=True, slots=True)
class Quota:
    """The room for all requests together, and the words of its errors."""

    room: SharedRoom
    unit: str
    asks: str  # the verb in "the request has 3 sequences"
    setting: str  # the name of the setting that bounds it

    def of_key(self, key: str, bound: int, seconds: float) -> KeyQuota:
        """The own quota of a key, whose requests end in about so many seconds."""
        limit = bound if self.room.bound is None else min(bound, self.room.bound)
        used = self.room.used_by(key)
        return KeyQuota(self.unit, limit, max(limit - used, 0), seconds if used else 0.0)

    def never_fits(self, amount: int, bound: int, whose: str) -> str:
        return (
            f"the request {self.asks} {amount} {self.unit}, but all requests{whose} together may "
            f"take at most {bound}: ask for fewer or shorter answers"
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
        """The share of a request's key when `newcomer` arrives; empty if there is no other key."""
        shares = self.room.shares(newcomer.key, newcomer.weight)
        if shares is None or len(shares) == 1:
            return ""
        return f"; the key's share is {math.floor(shares[holding.key])}"
