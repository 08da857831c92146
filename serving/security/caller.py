"""The caller of the call that a task serves: the owner of a configured key, or anonymous.

It is a context variable, set once per call before the service's own code runs, so that limits and
logs can read it anywhere.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

Permission = Literal["generate", "operate"]


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """A key's limits in a gateway; None is no limit beyond the gateway's own."""

    max_sequences: int | None = None  # running and queued generations
    max_tokens: int | None = None  # their prompt and answer tokens together
    max_priority: int = 0
    weight: float = 1.0  # its share if keys compete, relative to the others'


@dataclass(frozen=True, slots=True)
class Caller:
    """A key's owner. Logs and metrics show its `name`; the key itself is not kept."""

    name: str
    permissions: frozenset[Permission]
    limits: CallerLimits = field(default_factory=CallerLimits)
    cache_scope: str = ""  # callers of the same scope share cached prefixes


# All callers if no keys are configured; it may do everything.
ANONYMOUS = Caller("", frozenset({"generate", "operate"}), CallerLimits(max_priority=100))

_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current() -> Caller:
    """The caller of the call that this task serves."""
    return _current.get()


def identify(caller: Caller) -> None:
    """Sets the caller for the rest of this task and for the tasks that it starts."""
    _current.set(caller)
