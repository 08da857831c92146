"""OpenAI's headers that tell a client how much of its key's quotas is left.

OpenAI's quotas are for requests and tokens in a span of time. Those of a key here are for answers
and tokens that run and wait at once, so they are free again as soon as the answers end.
"""

import math
from collections.abc import Iterable
from typing import Protocol

# OpenAI's words for the units of quotas.
_UNITS = {"sequences": "requests", "tokens": "tokens"}

HEADERS = {
    f"x-ratelimit-{what}-{unit}": meaning
    for what, meaning in (
        ("limit", "the quota of the request's key, if it has one"),
        ("remaining", "what is left of it"),
        ("reset", "about how long until all of it is free, such as 1.5s"),
    )
    for unit in _UNITS.values()
}


class KeyQuota(Protocol):
    """A quota of a key at one moment."""

    @property
    def unit(self) -> str:
        """Sequences, or tokens."""

    @property
    def limit(self) -> int: ...

    @property
    def remaining(self) -> int: ...

    @property
    def reset(self) -> float:
        """Seconds until all of it is free."""


def rate_limit_headers(quotas: Iterable[KeyQuota]) -> dict[str, str]:
    """The headers for the quotas of a request's key."""
    headers = {}
    for quota in quotas:
        unit = _UNITS[quota.unit]
        headers[f"x-ratelimit-limit-{unit}"] = str(quota.limit)
        headers[f"x-ratelimit-remaining-{unit}"] = str(quota.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = f"{math.ceil(quota.reset * 1000) / 1000:g}s"
    return headers
