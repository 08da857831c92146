"""Timeouts and intervals of the gateway's sessions with the services behind it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """All in seconds."""

    hang_timeout: float = 10.0  # a replica that does not answer for this long counts as lost
    failover_timeout: float = 30.0  # wait of a sequence for a replica, or a call for the tokenizer
    resolve_interval: float = 5.0  # between two DNS lookups
