"""The tensors of a GGUF file, and the shape of the network in its metadata, without PyTorch."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from model_service.model.config import ModelConfig
from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError
from model_service.model.weights.files.gguf.config import check_kind, read_config, read_divisors
from model_service.model.weights.files.gguf.header import (
    CONVERT_AGAIN,
    GgufHeader,
    TensorEntry,
    read_header,
)
from model_service.offline.headers.tensor_header import TensorHeader

_EMBEDDING, _OUTPUT, _DIVISORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_gguf_header(path: Path) -> list[TensorHeader]:
    """The tensors of the file at `path`, whose extents are compared with its size.

    Raises:
        CheckpointError: the file is cut short, damaged, or holds an unknown type.
    """
    data = _map(path)
    header = read_header(path, data.data)
    tensors = []
    for name, entry in header.tensors.items():
        tensor = _described(path, name, entry)
        end = entry.begin + tensor.size
        if end > len(data):
            problem = f"is cut short: {name} ends at byte {end}, the file at byte {len(data)}"
            raise CheckpointError(path, problem, FETCH_AGAIN)
        tensors.append(tensor)
    return tensors


def read_gguf_config(path: Path) -> ModelConfig:
    """The shape of the network in the file at `path`.

    Raises:
        CheckpointError: the file holds no whole model of the architecture llama.
    """
    data = _map(path)
    header = read_header(path, data.data)
    check_kind(path, header.metadata)
    if _EMBEDDING not in header.tensors:
        raise CheckpointError(path, f"lacks {_EMBEDDING}", CONVERT_AGAIN)
    config = read_config(
        path,
        header.metadata,
        vocab_size=header.tensors[_EMBEDDING].shape[0],
        tied=_OUTPUT not in header.tensors,
    )
    divisors = _divisors(data, header, config)
    if divisors is None:
        return config
    scaling = read_divisors(path, divisors, config)
    return replace(config, rope_scaling=scaling or config.rope_scaling)


def _divisors(
    data: NDArray[np.uint8], header: GgufHeader, config: ModelConfig
) -> NDArray[np.float32] | None:
    """The divisors of the rotary frequencies [head_dim / 2], by which llama.cpp stores a scaling.

    Those of another shape or type are refused when the model is loaded.
    """
    entry = header.tensors.get(_DIVISORS)
    if entry is None or entry.shape != (config.head_dim // 2,):
        return None
    if entry.type_number != GGMLQuantizationType.F32 or entry.begin + 4 * entry.shape[0] > len(
        data
    ):
        return None  # a file that is cut short is refused when its tensors are read
    return np.frombuffer(data[entry.begin : entry.begin + 4 * entry.shape[0]], dtype="<f4")


def _described(path: Path, name: str, entry: TensorEntry) -> TensorHeader:
    try:
        kind = GGMLQuantizationType(entry.type_number)
    except ValueError:
        problem = f"{name} is stored in the unknown type {entry.type_number}"
        raise CheckpointError(path, problem, CONVERT_AGAIN) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    size = math.prod(entry.shape) // block * block_bytes
    return TensorHeader(name, _PLAIN.get(kind.name, kind.name), entry.shape, size)


def _map(path: Path) -> NDArray[np.uint8]:
    """The bytes of the file, read when they are used."""
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(path, "is empty", FETCH_AGAIN)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from None
