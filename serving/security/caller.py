"""Who makes the call that a task serves: one of the configured keys, or nobody in particular.

It lives in a context variable, set once per call before the service's own code runs, so that limits
and logs can ask for it wherever they are.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

Permission = Literal["generate", "operate"]


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What one key may have of a gateway; None is without a bound of its own."""

    max_sequences: int | None = None  # generations that run or wait at once
    max_tokens: int | None = None  # prompt and answer tokens of those together
    max_priority: int = 0
    weight: float = 1.0  # its share where keys compete, relative to the others'


@dataclass(frozen=True, slots=True)
class Caller:
    """A key's owner. `name` is what logs and metrics may show; the key itself is nowhere."""

    name: str
    permissions: frozenset[Permission]
    limits: CallerLimits = field(default_factory=CallerLimits)
    cache_scope: str = ""  # whose prompts it shares cached beginnings with


# Where no keys are configured, everybody is this one caller, and may do everything.
ANONYMOUS = Caller("", frozenset({"generate", "operate"}), CallerLimits(max_priority=100))

_current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current() -> Caller:
    """The caller of the call that this task serves."""
    return _current.get()


def identify(caller: Caller) -> None:
    """Sets the caller for the rest of this task, and for what it starts."""
    _current.set(caller)
