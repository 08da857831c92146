"""Writes a checkpoint with linear layers in int8, int4 or fp8.

The number of files stays: each shard's weights are quantized separately, as a replica of as many
shards does when it loads the original, so both give the same answers.
"""

import json
from pathlib import Path

import torch

from model_service.model.config import Quantization
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta_checkpoint import Checkpoint, open_checkpoint
from model_service.model.weights.files.meta_files import shard_files
from model_service.model.weights.finite import check_finite, extremes
from model_service.model.weights.partition import is_linear
from model_service.model.weights.quantization import FORMATS, GROUP_SIZE
from serving.errors import StartError


def quantize_checkpoint(source: Path, target: Path, quantization: Quantization) -> None:
    """Writes the checkpoint in `source` to the new or empty folder `target`.

    Raises:
        StartError: the source is no checkpoint in floating point, its rows cannot be quantized
            so, or the target is in use or cannot be written.
    """
    checkpoint = open_checkpoint(source)
    _check(checkpoint, target, quantization)
    paths = shard_files(source)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for number, tensors in enumerate(checkpoint.files):
            content: dict[str, torch.Tensor] = {}
            for name, weight in tensors.items():
                if not isinstance(weight, torch.Tensor):
                    raise TypeError(f"{name} is quantized")  # _check has refused such checkpoints
                check_finite(paths[number], {name: extremes(weight)})
                if is_linear(name):
                    content |= FORMATS[quantization].quantize(weight).stored(name)
                else:
                    content[name] = weight.clone()
            torch.save(content, target / f"consolidated.{number:02d}.pth")
        params = json.loads((source / "params.json").read_text(encoding="utf-8"))
        params["quantization"] = quantization
        (target / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartError(f"{target} cannot be written: {error.strerror}") from error


def _check(checkpoint: Checkpoint, target: Path, quantization: Quantization) -> None:
    if checkpoint.config.quantization != "none":
        raise CheckpointError(
            checkpoint.folder,
            f"is quantized already, to {checkpoint.config.quantization}",
            "quantize the original",
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StartError(f"{target} is not an empty folder: name a new one")
    if quantization == "int4":
        for name, weight in checkpoint.files[0].items():
            if is_linear(name) and weight.shape[1] % GROUP_SIZE:
                raise StartError(
                    f"int4 weights share a scale among {GROUP_SIZE} neighbours of a row, which "
                    f"does not divide the {weight.shape[1]} of {name}: use int8"
                )
