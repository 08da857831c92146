"""The header of a mapped GGUF file, with the errors of a checkpoint."""

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from llama import gguf_header
from llama.gguf_header import VERSIONS, GgufError, GgufHeader, GgufVersionError, TensorEntry
from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError

CONVERT_AGAIN = "convert the model again with llama.cpp's convert_hf_to_gguf.py"


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of the file, mapped: read when they are used.

    Raises:
        CheckpointError: the file is missing, empty or cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(path, "is empty", FETCH_AGAIN)
        # Pages are private to this process, because PyTorch warns of tensors that are read-only.
        return np.memmap(path, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise CheckpointError(path, "not found", "name a GGUF file") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from error


def read_header(path: Path, data: memoryview) -> GgufHeader:
    """The header of the file at `path`, whose bytes are `data`.

    Raises:
        CheckpointError: this is no GGUF file of version 2 or 3 in little-endian order, or it is
            damaged.
    """
    try:
        return gguf_header.read_header(data)
    except GgufVersionError as error:
        raise _another_version(path, error.version) from None
    except GgufError as error:
        raise CheckpointError(path, str(error), error.fix) from None


def _another_version(path: Path, version: int | None) -> CheckpointError:
    if version is None:
        return CheckpointError(
            path,
            "is in big-endian order",
            "convert it with gguf_convert_endian.py of llama.cpp, or download the usual file",
        )
    return CheckpointError(
        path,
        f"is in version {version} of GGUF; versions {VERSIONS[0]} and {VERSIONS[1]} are read",
        CONVERT_AGAIN,
    )


def type_name(number: int) -> str:
    """GGML's name of a type; the number may be unknown."""
    return {kind.value: kind.name for kind in GGMLQuantizationType}.get(number, f"type {number}")


def tensor_bytes(
    path: Path, name: str, entry: TensorEntry, data: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The part of the file's bytes that holds the tensor `name`, of one of GGML's types.

    Raises:
        CheckpointError: it is not within the file.
    """
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.type_number)]
    end = entry.begin + math.prod(entry.shape) // block * block_bytes
    if end > len(data):
        raise CheckpointError(
            path,
            f"is cut short: {name} ends at byte {end}, the file at byte {len(data)}",
            FETCH_AGAIN,
        )
    return data[entry.begin : end]
