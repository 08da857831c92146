"""The names, types and shapes of the tensors in a .safetensors file."""

from pathlib import Path

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.safetensors_files import opened
from model_service.offline.headers.tensor_header import TensorHeader, bytes_of

# The format's names of types, and PyTorch's.
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors_header(path: Path) -> list[TensorHeader]:
    """The tensors of the file at `path`, whose sizes the library compares with the file's.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or holds an unknown type.
    """
    with opened(path, "numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    headers = []
    for name, (dtype, shape) in found.items():
        if dtype not in _TYPES:
            fix = "use float32, float16 or bfloat16 weights"
            raise CheckpointError(path, f"{name} is {dtype}", fix)
        kind = _TYPES[dtype]
        headers.append(TensorHeader(name, kind, tuple(shape), bytes_of(kind, tuple(shape))))
    return headers
