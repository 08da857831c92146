"""What the tensors of a checkpoint's files must be, by the network's shape."""

from pathlib import Path

import torch

from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.partition import is_linear, part_shape
from model_service.model.quantization import FP8, GROUP_SIZE

# Computed from the shape of the network; Meta's files carry it, some conversions leave it out.
DERIVED = {"rope.freqs"}
FLOAT_TYPES = {torch.float32, torch.float16, torch.bfloat16}


def check_tensors(
    path: Path, tensors: dict[str, torch.Tensor], config: ModelConfig, files: int
) -> None:
    """Raises CheckpointError unless `tensors` is one of `files` equal parts of the network."""
    expected = _expected_tensors(config, files)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            path, f"lacks {_some(missing)}", "use the params.json that came with this file"
        )
    unexpected = sorted(tensors.keys() - expected.keys() - DERIVED)
    if unexpected:
        raise CheckpointError(
            path, f"also holds {_some(unexpected)}", "use the params.json that came with this file"
        )
    for name, (shape, dtypes) in expected.items():
        tensor = tensors[name]
        if tensor.dtype not in dtypes:
            wanted = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                path,
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}",
                f"use {' or '.join(wanted)} weights",
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                path,
                f"{name} is {_dimensions(tensor.shape)}; params.json and {files} "
                f"file{'s' * (files > 1)} make it {_dimensions(shape)}",
                "put all files of one checkpoint, and only these, into the folder",
            )


def _expected_tensors(
    config: ModelConfig, files: int
) -> dict[str, tuple[tuple[int, ...], set[torch.dtype]]]:
    """Shape and dtypes of each tensor in one of `files` files."""
    expected = {}
    for name, whole in config.parameter_shapes().items():
        shape = part_shape(name, whole, files)
        if config.quantization == "none" or not is_linear(name):
            expected[name] = (shape, FLOAT_TYPES)
            continue
        outputs, inputs = shape
        if config.quantization != "int4":
            codes = FP8 if config.quantization == "fp8" else torch.int8
            parts = {"": ((outputs, inputs), codes), ".scales": ((outputs,), torch.float32)}
        else:
            groups = ((outputs, inputs // GROUP_SIZE), torch.float32)
            parts = {
                "": ((outputs, inputs // 2), torch.uint8),
                ".scales": groups,
                ".minima": groups,
            }
        expected |= {name + part: (size, {dtype}) for part, (size, dtype) in parts.items()}
    return expected


def _dimensions(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
