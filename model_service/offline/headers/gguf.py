"""The tensors of a GGUF file, and the shape of the network in its metadata, without PyTorch."""

from pathlib import Path

from gguf import GGMLQuantizationType

from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.config import read_config
from model_service.model.weights.files.gguf.header import (
    CONVERT_AGAIN,
    map_file,
    read_header,
    tensor_bytes,
    type_name,
)
from model_service.offline.headers.tensor_header import TensorHeader

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = frozenset(GGMLQuantizationType)


def read_gguf_header(path: Path) -> list[TensorHeader]:
    """The tensors of the file at `path`, whose extents are compared with its size.

    Raises:
        CheckpointError: the file is cut short, damaged, or holds an unknown type.
    """
    data = map_file(path)
    tensors = []
    for name, entry in read_header(path, data.data).tensors.items():
        if entry.type_number not in _TYPES:
            problem = f"{name} is stored in the unknown type {entry.type_number}"
            raise CheckpointError(path, problem, CONVERT_AGAIN)
        kind, size = type_name(entry.type_number), len(tensor_bytes(path, name, entry, data))
        tensors.append(TensorHeader(name, _PLAIN.get(kind, kind), entry.shape, size))
    return tensors


def read_gguf_config(path: Path) -> ModelConfig:
    """The shape of the network in the file at `path`.

    Raises:
        CheckpointError: the file holds no whole model of the architecture llama.
    """
    data = map_file(path)
    return read_config(path, read_header(path, data.data), data)
