"""How long the gateway's relations to the services behind it may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """All in seconds."""

    hang_timeout: float = 10.0  # a replica that does not answer for so long is lost
    # How long a sequence waits for a replica, and a call for the tokenizer service, to come back.
    failover_timeout: float = 30.0
    resolve_interval: float = 5.0  # from one look at the names to the next
