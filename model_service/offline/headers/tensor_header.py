"""A tensor as the header of a file states it: its numbers are not read."""

import math
from dataclasses import dataclass

# Bits of one number.
_BITS = {
    "float64": 64,
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "int64": 64,
    "int32": 32,
    "int16": 16,
    "int8": 8,
    "uint8": 8,
    "bool": 8,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A stored tensor.

    Attributes:
        name: as in the file.
        dtype: PyTorch's name of the type, or GGML's of a quantized one.
        shape: rows before columns.
        size: bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a dense tensor of one of PyTorch's types."""
    return math.prod(shape) * _BITS[dtype] // 8
