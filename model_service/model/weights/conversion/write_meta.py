"""Writes a checkpoint in Meta's format: `params.json` and `consolidated.*.pth`."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model_service.model.config import Quantization
from model_service.model.weights.conversion.target import new_folder
from model_service.model.weights.files.meta_params import params_of
from model_service.model.weights.partition import is_linear, part_shape
from model_service.model.weights.quantization import FORMATS, GROUP_SIZE
from model_service.model.weights.source import WeightSource
from serving.errors import StartError

CPU = torch.device("cpu")


def write_meta(
    source: WeightSource, folder: Path, *, files: int = 1, quantization: Quantization = "none"
) -> None:
    """Writes the weights of `source`, each in the type in which it is stored there.

    Only one parameter is in memory at a time: a file is collected in mapped temporary files beside
    it, so the disk needs room for it twice. A tied output matrix is written as one of its own, as
    in Meta's files.

    Args:
        source: of the weights.
        folder: new or empty.
        files: equal parts into which the network is cut, one per file.
        quantization: of the linear layers, each part separately.

    Raises:
        StartError: the weights are not finite, rows cannot be quantized so, or the folder is in
            use or cannot be written.
    """
    config = source.config
    _check_groups(source, files, quantization)
    with new_folder(folder):
        for number in range(files):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as staging:
                content: dict[str, torch.Tensor] = {}
                for name, weight in source.read_shard(number, files, torch.float32, CPU):
                    if quantization != "none" and is_linear(name):
                        stored = FORMATS[quantization].quantize(weight).stored(name)
                    else:
                        stored = {name: weight.to(source.stored_dtype(name))}
                    content |= _mapped(stored, Path(staging))
                torch.save(content, folder / f"consolidated.{number:02d}.pth")
        params = params_of(replace(config, quantization=quantization))
        (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _mapped(tensors: Mapping[str, torch.Tensor], staging: Path) -> dict[str, torch.Tensor]:
    """The tensors in new mapped files, so that the system may write them out and drop them."""
    mapped = {}
    for name, tensor in tensors.items():
        path = str(staging / name)
        mapped[name] = torch.from_file(path, shared=True, size=tensor.nbytes, dtype=torch.uint8)
        mapped[name] = mapped[name].view(tensor.dtype).view(tensor.shape)
        mapped[name].copy_(tensor)
    return mapped


def _check_groups(source: WeightSource, files: int, quantization: Quantization) -> None:
    if quantization != "int4":
        return
    for name, shape in source.config.parameter_shapes().items():
        inputs = part_shape(name, shape, files)[-1]
        if is_linear(name) and inputs % GROUP_SIZE:
            raise StartError(
                f"int4 weights share a scale among {GROUP_SIZE} neighbours of a row, which does "
                f"not divide the {inputs} of {name}: use int8"
            )
