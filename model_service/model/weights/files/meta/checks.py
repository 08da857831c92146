"""Checks of the tensors in a checkpoint's files: by the network's shape, by their values, and
against each other.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError, shown_names, shown_shape
from model_service.model.weights.finite import check_finite, extremes
from model_service.model.weights.partition import (
    EMBEDDING,
    is_linear,
    part_shape,
    split_dimension,
    splits_vocabulary,
)
from model_service.model.weights.quantization import FP8, GROUP_SIZE

# Computed from the shape of the network. Meta's files hold it, some conversions do not.
DERIVED = {"rope.freqs"}
# Copies of one tensor that were trained side by side may differ by some roundings.
MAX_DRIFT = 0.01
ONE_CHECKPOINT = "put all files of one checkpoint, and only these, into the folder"
FLOAT_TYPES = {torch.float32, torch.float16, torch.bfloat16}

_log = logging.getLogger(__name__)


def check_tensors(
    path: Path, tensors: dict[str, torch.Tensor], config: ModelConfig, files: int
) -> None:
    """Raises CheckpointError unless `tensors` is one of `files` equal parts of the network.

    The embedding may be split as in Llama 2 or as in Llama 3.
    """
    _check_names(path, tensors, config)
    if uneven := _uneven(config, files):
        raise CheckpointError(path.parent, f"{files} files do not divide {uneven}", ONE_CHECKPOINT)
    expected = _expected_tensors(config, files)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            path, f"lacks {shown_names(missing)}", "use the params.json that came with this file"
        )
    unexpected = sorted(tensors.keys() - expected.keys() - DERIVED)
    if unexpected:
        raise CheckpointError(
            path,
            f"also holds {shown_names(unexpected)}",
            "use the params.json that came with this file",
        )
    embedding = tuple(tensors[EMBEDDING].shape)
    if splits_vocabulary(embedding, config, files):
        expected[EMBEDDING] = (embedding, FLOAT_TYPES)
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
                f"{name} is {shown_shape(tensor.shape)}; params.json and {files} "
                f"file{'s' * (files > 1)} make it {shown_shape(shape)}",
                ONE_CHECKPOINT,
            )


def check_copies(
    paths: Sequence[Path], files: Sequence[Mapping[str, torch.Tensor]], config: ModelConfig
) -> None:
    """Raises CheckpointError unless all files agree in the tensors that each of them holds whole.

    Differences by some roundings are logged, and the first file's copy is used.
    """
    whole = [name for name in config.parameter_shapes() if split_dimension(name) is None]
    for path, tensors in zip(paths, files, strict=True):
        for name in whole:
            check_finite(path, {name: extremes(tensors[name])})
        drift = 0.0
        for name in (*whole, *(DERIVED & files[0].keys() & tensors.keys())):
            first, copy = files[0][name].float(), tensors[name].float()
            apart = (first - copy).abs().max().item() if first.shape == copy.shape else MAX_DRIFT
            if apart >= MAX_DRIFT:
                raise CheckpointError(
                    path, f"{name} is not the one that {paths[0].name} holds", ONE_CHECKPOINT
                )
            drift = max(drift, apart)
        if drift:
            _log.warning(
                "%s: norms differ by up to %.2g from those of %s, which are taken",
                *(path, drift, paths[0].name),
            )


def _check_names(path: Path, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    """Raises CheckpointError if names have a prefix, or the number of layers is not as stated.

    This comes before any list that is as long as params.json states.
    """
    embedding = next((name for name in tensors if name.endswith("tok_embeddings.weight")), "")
    if prefix := embedding.removesuffix("tok_embeddings.weight"):
        raise CheckpointError(
            path,
            f"its names begin with {prefix!r}",
            "save it once without: torch.save({name.removeprefix("
            f"{prefix!r}): tensor for name, tensor in torch.load(path, weights_only=True).items()"
            "}, path)",
        )
    layers = {found[1] for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != config.n_layers:
        raise CheckpointError(
            path,
            f"holds {len(layers)} layers, params.json states n_layers {config.n_layers}",
            "use the params.json that came with this file",
        )


def _uneven(config: ModelConfig, files: int) -> str:
    """A dimension that the number of files does not divide; empty if there is none."""
    for name, shape in config.parameter_shapes().items():
        dimension = split_dimension(name)
        if dimension is not None and shape[dimension] > 0 and shape[dimension] % files:
            return f"the {shape[dimension]} of {name}"
    return ""


def _expected_tensors(
    config: ModelConfig, files: int
) -> dict[str, tuple[tuple[int, ...], set[torch.dtype]]]:
    """The shape and the allowed dtypes of each tensor in one of `files` files."""
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
