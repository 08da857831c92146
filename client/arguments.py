"""Checks of Python values before they go into a protobuf message.

Protobuf accepts more than it documents: bytes for a text, True for 1, any number for a flag; and
Python iterates a text as its characters and bytes as numbers. Each function here returns a value
of the right type, or raises a ValueError whose text continues the field's name: "must be …, not …".
"""

import math
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from types import UnionType
from typing import TypeVar, cast

from client.errors import Violation, invalid_request

T = TypeVar("T")

# gRPC counts deadlines in 64-bit nanoseconds: a longer timeout would overflow and pass at once.
_ENDLESS = 1e9  # seconds, 31 years

# In this order, the first match decides.
_KINDS: tuple[tuple[type | UnionType, str], ...] = (
    (str, "a text"),
    (bytes | bytearray | memoryview, "bytes"),
    (Mapping, "a dictionary"),
    (list, "a list"),
    (tuple, "a tuple"),
)
_FLAGS = frozenset({True, False})


def kind(value: object) -> str:
    """Describes a value in an error message."""
    if value is None or isinstance(value, int | float):
        return repr(value)
    for types, words in _KINDS:
        if isinstance(value, types):
            return words
    return f"a value of type {type(value).__name__}"


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {kind(value)}")
    return value


def items(value: object, wanted: str, *, ordered: bool = True) -> list[object]:
    """The items of a list or another iterable that can stand for one.

    `wanted` describes the field in the error. With `ordered`, a set is refused.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not (
        isinstance(value, Iterable)
    ):
        raise ValueError(f"must be {wanted}, not {kind(value)}")
    if ordered and isinstance(value, Set):
        raise ValueError(f"must be {wanted}, not a set, which has no order")
    return [*value]


def integer(value: object, low: int, high: int) -> int:
    """An integer in a range; also from another library's type, such as NumPy's."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(cast("int", value))
    except TypeError:
        raise ValueError(f"must be an integer, not {kind(value)}") from None
    if not low <= number <= high:
        raise ValueError(f"must be {low} to {high}, not {number}")
    return number


def number(value: object) -> float:
    if not isinstance(value, bool | str | bytes | bytearray):
        try:
            return float(cast("float", value))
        except OverflowError:
            return math.inf if cast("int", value) > 0 else -math.inf  # for range checks to refuse
        except (TypeError, ValueError):
            pass
    raise ValueError(f"must be a number, not {kind(value)}")


def flag(value: object) -> bool:
    """True or False, also as 1 or 0; another number could be meant as a count."""
    if not isinstance(value, Hashable) or value not in _FLAGS:
        raise ValueError(f"must be True or False, not {kind(value)}")
    return bool(value)


def seconds(value: object) -> float | None:
    """A time limit in seconds; None: no limit, also for inf and times above 31 years."""
    if value is None:
        return None
    limit = number(value)
    if not limit >= 0:
        raise ValueError(f"must be a number of seconds, 0 or more, not {limit:g}")
    return None if limit > _ENDLESS else limit


class Refusals:
    """Collects the values that cannot be sent, so that one error reports all of them."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Turns a failure to fill the field at `path` into its violation."""
        try:
            yield
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(error.object[error.start]):04X} at character {error.start}"
            self.add(path, f"holds a lone surrogate ({surrogate}), which is not valid unicode")
        except ValueError as error:
            self.add(path, str(error))

    def items(self, path: str, value: object, wanted: str, *, ordered: bool = True) -> list[object]:
        """The items of the list for the field at `path`; none if it is not a list."""
        try:
            return items(value, wanted, ordered=ordered)
        except ValueError as error:
            self.add(path, str(error))
            return []

    def add(self, path: str, description: str) -> None:
        self.found.append(Violation(path, description))


@contextmanager
def collected(options: Mapping[str, object], known: frozenset[str]) -> Iterator[Refusals]:
    """Checks the options of a call; raises one error at the end for all values refused."""
    # Python does the same for a function that names its keyword arguments.
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    refusals = Refusals()
    with refusals.at("timeout"):
        seconds(options.get("timeout"))
    yield refusals
    if refusals.found:
        raise invalid_request(refusals.found)


def choice(choices: Mapping[str, T], name: object) -> T:
    if not isinstance(name, str) or name not in choices:
        *others, last = choices
        given = repr(name) if isinstance(name, str) else kind(name)
        raise ValueError(f"must be {', '.join(others)} or {last}, not {given}")
    return choices[name]
