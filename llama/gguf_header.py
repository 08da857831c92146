"""The metadata of a GGUF file: the keys and values in front of its tensors.

The `gguf` package makes two NumPy arrays for each string, which takes two seconds for a vocabulary
of 49,152 tokens; this takes a tenth of one. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# By the numbers of the format: UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, …
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_KEYS = 65536


class GgufError(ValueError):
    """The file is not a GGUF file that can be read; the message says where and why."""


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """All keys with their values: numbers, booleans, strings, and lists of them.

    Raises:
        OSError: the file cannot be read.
        GgufError: it is damaged or of another format.
    """
    with Path(path).open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError("it does not begin with GGUF, as every GGUF file does")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).metadata()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)

    def metadata(self) -> dict[str, Any]:
        (version,) = self._numbers("I", 1)
        if version not in _VERSIONS:
            # A file for the other byte order has its version in the upper half.
            problem = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            raise GgufError(f"it {problem}; little-endian files of version 2 and 3 can be read")
        _tensors, keys = self._numbers("Q", 2)
        if keys > _MAX_KEYS:
            raise GgufError(f"it claims to have {keys} keys, more than any model")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("the name of a key")
            metadata[key] = self._value(key, self._numbers("I", 1)[0])
        return metadata

    def _value(self, key: str, kind: int) -> Any:  # noqa: ANN401  # as in JSON
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, depth=1)
        return self._numbers(self._number_format(key, kind), 1)[0]

    def _array(self, key: str, depth: int) -> list[Any]:
        (kind,) = self._numbers("I", 1)
        (length,) = self._numbers("Q", 1)
        if kind not in (_STRING, _ARRAY):
            return list(self._numbers(self._number_format(key, kind), length))
        if depth > _MAX_DEPTH:
            raise GgufError(f"the lists of {key} are nested more than {_MAX_DEPTH} deep")
        self._check_room(8 * length)  # the length in front of each element
        read: Callable[[], Any] = lambda: self._string(key)  # noqa: E731
        if kind == _ARRAY:
            read = lambda: self._array(key, depth + 1)  # noqa: E731
        return [read() for _ in range(length)]

    def _number_format(self, key: str, kind: int) -> str:
        if kind not in _NUMBERS:
            raise GgufError(f"{key} has the unknown type {kind}")
        return _NUMBERS[kind]

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        self._check_room(size)
        numbers = struct.unpack_from(f"<{count}{code}", self._data, self._at)
        self._at += size
        return numbers

    def _string(self, key: str) -> str:
        (length,) = self._numbers("Q", 1)
        self._check_room(length)
        text = self._data[self._at : self._at + length]
        self._at += length
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"{key} has a text that is not UTF-8") from error

    def _check_room(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise GgufError(f"it ends in its metadata, after {len(self._data)} bytes")
