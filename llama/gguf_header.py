"""The header of a GGUF file: its metadata, and where each tensor lies.

The `gguf` package makes two NumPy arrays for each string, which takes two seconds for a vocabulary
of 49,152 tokens; this takes a twentieth of one. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
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
_SIZE = struct.Struct("<Q")
# Far above any real file: a larger number is a damaged one.
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_KEYS = 65536
_MAX_ELEMENTS = 2**24
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32  # bytes, unless the metadata state another


class GgufError(ValueError):
    """The file is not a GGUF file that can be read; the message says why, without its name."""

    fix = "copy or download it again"


class NotGgufError(GgufError):
    """The file is of another format."""

    fix = "name a GGUF file"


class GgufVersionError(GgufError):
    """The file is of a version that is not read, or in big-endian order (`version` is None)."""

    def __init__(self, stated: int) -> None:
        # A file for the other byte order has its version in the upper half.
        self.version = None if stated & 0xFFFF == 0 else stated
        problem = "is big-endian" if self.version is None else f"has version {stated}"
        super().__init__(f"{problem}; little-endian files of version 2 and 3 can be read")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header states it.

    Attributes:
        shape: rows before columns, as in PyTorch; the file lists the sizes in reverse.
        type_number: one of GGML's types; the number may be unknown.
        begin: its first byte in the file.
    """

    shape: tuple[int, ...]
    type_number: int
    begin: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Numbers, booleans, strings, and lists of them by their keys; and the tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """All keys with their values: numbers, booleans, strings, and lists of them.

    Raises:
        OSError: the file cannot be read.
        GgufError: it is damaged or of another format.
    """
    with Path(path).open("rb") as file:
        if not file.read(1):  # which cannot be mapped
            return _Reader(memoryview(b"")).metadata()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return _Reader(view).metadata()


def read_header(data: memoryview) -> GgufHeader:
    """The header of the file with these bytes.

    Raises:
        GgufError: it is damaged or of another format.
    """
    reader = _Reader(data)
    metadata = reader.metadata()
    return GgufHeader(metadata, reader.tensors(metadata.get("general.alignment", _ALIGNMENT)))


class _Reader:
    """Reads values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = len(MAGIC)
        self._tensors = 0

    def metadata(self) -> dict[str, Any]:
        if self._data[: len(MAGIC)] != MAGIC:
            raise NotGgufError("does not begin with GGUF, as every GGUF file does")
        (version,) = self._numbers("I", 1)
        if version not in VERSIONS:
            raise GgufVersionError(version)
        self._tensors, keys = self._numbers("Q", 2)
        if keys > _MAX_KEYS:
            raise GgufError(f"is damaged: it claims to have {keys} keys, more than any model")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("the name of a key")
            if key in metadata:
                raise GgufError(f"is damaged: its header states {key} twice")
            metadata[key] = self._value(key, self._numbers("I", 1)[0])
        return metadata

    def tensors(self, alignment: object) -> dict[str, TensorEntry]:
        """The entries behind the metadata; tensors begin at multiples of `alignment` bytes."""
        # Tensors of numbers are mapped as they lie, so each must begin at a multiple of its size.
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise GgufError(f"general.alignment is {alignment!r}, not a power of two from 8 on")
        entries: dict[str, TensorEntry] = {}
        for _ in range(self._tensors):
            name = self._string("the name of a tensor")
            if name in entries:
                raise GgufError(f"is damaged: its header holds two tensors {name}")
            entries[name] = self._entry(name)
        start = -(-self._at // alignment) * alignment
        moved = {name: replace(each, begin=start + each.begin) for name, each in entries.items()}
        if unaligned := [name for name, each in moved.items() if each.begin % alignment]:
            raise GgufError(
                f"is damaged: {unaligned[0]} does not begin at a multiple of {alignment} bytes"
            )
        return moved

    def _entry(self, name: str) -> TensorEntry:
        (dimensions,) = self._numbers("I", 1)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise GgufError(f"is damaged: {name} has {dimensions} dimensions")
        sizes = self._numbers("Q", dimensions)
        (type_number,) = self._numbers("I", 1)
        return TensorEntry(sizes[::-1], type_number, *self._numbers("Q", 1))

    def _value(self, key: str, kind: int) -> Any:  # noqa: ANN401  # as in JSON
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, depth=1)
        return self._numbers(self._number_format(key, kind), 1)[0]

    def _array(self, key: str, depth: int) -> list[Any]:
        (kind,) = self._numbers("I", 1)
        (length,) = self._numbers("Q", 1)
        plain = kind not in (_STRING, _ARRAY)
        code = self._number_format(key, kind) if plain else "Q"  # the length of each element
        self._check_room(struct.calcsize(f"<{code}") * length)
        if length > _MAX_ELEMENTS:
            raise GgufError(f"is damaged: {key} has {length} elements")
        if plain:
            return list(self._numbers(code, length))
        if kind == _STRING:
            return [self._string(key) for _ in range(length)]
        if depth > _MAX_DEPTH:
            raise GgufError(
                f"is damaged: the lists of {key} are nested more than {_MAX_DEPTH} deep"
            )
        return [self._array(key, depth + 1) for _ in range(length)]

    def _number_format(self, key: str, kind: int) -> str:
        if kind not in _NUMBERS:
            raise GgufError(f"is damaged: {key} has the unknown type {kind}")
        return _NUMBERS[kind]

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        self._check_room(size)
        numbers = struct.unpack_from(f"<{count}{code}", self._data, self._at)
        self._at += size
        return numbers

    def _string(self, key: str) -> str:
        self._check_room(_SIZE.size)
        begin = self._at + _SIZE.size
        (length,) = _SIZE.unpack_from(self._data, self._at)
        self._at = begin
        self._check_room(length)
        self._at += length
        try:
            return str(self._data[begin : self._at], "utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"is damaged: {key} has a text that is not UTF-8") from error

    def _check_room(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise GgufError(f"is cut short: it ends in its metadata, after {len(self._data)} bytes")
