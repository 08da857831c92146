"""Checks of Python values before they go into a protobuf message.

Protobuf takes more than it says: bytes for a text, True for 1, any number for a flag; and Python
iterates a text as its characters and bytes as numbers. Each function here returns the value that
was meant, or raises a ValueError whose text follows the name of the field: "must be …, not …".
"""

import math
import operator
from collections.abc import Hashable, Iterable, Mapping, Set
from types import UnionType
from typing import cast

# gRPC counts deadlines in 64-bit nanoseconds: a longer timeout would overflow and pass at once.
_ENDLESS = 1e9  # seconds, 31 years


# In the order in which they are looked through.
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
    """The items of a list, or of anything else that can be iterated and is meant as a list.

    `wanted` says what the field takes. A set has no order, so it is refused where that matters.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not (
        isinstance(value, Iterable)
    ):
        raise ValueError(f"must be {wanted}, not {kind(value)}")
    if ordered and isinstance(value, Set):
        raise ValueError(f"must be {wanted}, not a set, which has no order")
    return [*value]


def integer(value: object, low: int, high: int) -> int:
    """Also from another library's type, such as NumPy's."""
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
    """True and False, their equals 1 and 0 included; another number could be meant as a count."""
    if not isinstance(value, Hashable) or value not in _FLAGS:
        raise ValueError(f"must be True or False, not {kind(value)}")
    return bool(value)


def seconds(value: object) -> float | None:
    """A time limit; None: there is none, which is also what inf and very long times mean."""
    if value is None:
        return None
    limit = number(value)
    if not limit >= 0:
        raise ValueError(f"must be a number of seconds, 0 or more, not {limit:g}")
    return None if limit > _ENDLESS else limit
