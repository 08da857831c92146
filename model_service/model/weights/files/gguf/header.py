"""The header of a GGUF file: its metadata, and where each tensor lies.

`GGUFReader` of the gguf package makes an array of every string in the vocabulary: 2 s and 160 MiB
for 49,152 tokens. A model needs no vocabulary, so this reader skips the elements of arrays.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from model_service.model.errors import FETCH_AGAIN, CheckpointError

CONVERT_AGAIN = "convert the model again with llama.cpp's convert_hf_to_gguf.py"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Far above any real file: a larger number is a damaged one.
_MAX_STRING = 2**24
_MAX_ELEMENTS = 2**24
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """An array in the metadata, whose elements are not read."""

    count: int


Value = bool | int | float | str | SkippedArray


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
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path, data: memoryview) -> GgufHeader:
    """The header of the file at `path`, whose bytes are `data`.

    Raises:
        CheckpointError: this is no GGUF file of version 2 or 3 in little-endian order, or it is
            damaged.
    """
    cursor = _Cursor(path, data)
    _check_version(path, cursor)
    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        name = cursor.text()
        if name in metadata:
            raise cursor.damage(f"states {name} twice")
        metadata[name] = cursor.value(cursor.value_type())
    entries: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        name, entry = _tensor_entry(cursor)
        if name in entries:
            raise cursor.damage(f"holds two tensors {name}")
        entries[name] = entry
    alignment = _alignment(path, metadata)
    start = -(-cursor.position // alignment) * alignment
    moved = {
        name: TensorEntry(entry.shape, entry.type_number, start + entry.begin)
        for name, entry in entries.items()
    }
    if unaligned := [name for name, entry in moved.items() if entry.begin % alignment]:
        raise cursor.damage(f"{unaligned[0]} does not begin at a multiple of {alignment} bytes")
    return GgufHeader(metadata, moved)


def _check_version(path: Path, cursor: "_Cursor") -> None:
    if cursor.read(len(MAGIC)) != MAGIC:
        raise CheckpointError(path, "does not begin with GGUF", "name a GGUF file")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:  # the specification's way to recognise the other byte order
        raise CheckpointError(
            path,
            "is in big-endian order",
            "convert it with gguf_convert_endian.py of llama.cpp, or download the usual file",
        )
    if version not in VERSIONS:
        raise CheckpointError(
            path,
            f"is in version {version} of GGUF; versions {VERSIONS[0]} and {VERSIONS[1]} are read",
            CONVERT_AGAIN,
        )


def _tensor_entry(cursor: "_Cursor") -> tuple[str, TensorEntry]:
    name = cursor.text()
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.damage(f"{name} has {dimensions} dimensions")
    sizes = [cursor.number("<Q") for _ in range(dimensions)]
    type_number = cursor.number("<I")
    return name, TensorEntry(tuple(reversed(sizes)), type_number, cursor.number("<Q"))


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    """The number of bytes at whose multiples tensors begin."""
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    # Tensors of numbers are mapped as they lie, so each must begin at a multiple of its item size.
    valid = isinstance(alignment, int) and alignment >= 8 and alignment & (alignment - 1) == 0
    if not valid or not isinstance(alignment, int):
        raise CheckpointError(
            path,
            f"general.alignment is {alignment!r}, not a power of two from 8 on",
            CONVERT_AGAIN,
        )
    return alignment


class _Cursor:
    """Reads values one after the other, and raises CheckpointError at the file's end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self._path = path
        self._data = data
        self.position = 0

    def damage(self, problem: str) -> CheckpointError:
        return CheckpointError(self._path, f"is damaged: its header {problem}", FETCH_AGAIN)

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes; returns where they begin."""
        begin = self.position
        if begin + size > len(self._data):
            raise CheckpointError(
                self._path,
                f"is cut short: its {len(self._data)} bytes end inside the header",
                FETCH_AGAIN,
            )
        self.position += size
        return begin

    def read(self, size: int) -> bytes:
        begin = self.skip(size)
        return self._data[begin : self.position].tobytes()

    def number(self, layout: str) -> int:
        number: int = self._scalar(layout)
        return number

    def _scalar(self, layout: str) -> int:
        begin = self.skip(struct.calcsize(layout))
        scalar: int = struct.unpack_from(layout, self._data, begin)[0]
        return scalar

    def text(self) -> str:
        size = self.number("<Q")
        if size > _MAX_STRING:
            raise self.damage(f"states a text of {size} bytes")
        try:
            return self.read(size).decode()
        except UnicodeDecodeError as error:
            raise self.damage("holds a text that is not UTF-8") from error

    def value_type(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.damage(f"holds a value of the unknown type {number}") from None

    def value(self, kind: GGUFValueType) -> Value:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._skip_array()
        return self._scalar(_SCALARS[kind])

    def _skip_array(self) -> SkippedArray:
        kind, count = self.value_type(), self.number("<Q")
        if count > _MAX_ELEMENTS or kind == GGUFValueType.ARRAY:
            raise self.damage(f"holds an array of {count} elements of type {kind.name}")
        if kind != GGUFValueType.STRING:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        else:
            for _ in range(count):
                self.skip(self.number("<Q"))
        return SkippedArray(count)
