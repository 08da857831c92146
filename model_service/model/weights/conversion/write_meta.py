"""Writes a checkpoint in Meta's format: `params.json` and `consolidated.*.pth`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from model_service.model.config import Quantization
from model_service.model.weights.conversion.mapped_tensors import mapped_tensors
from model_service.model.weights.conversion.target import Target, new_folder
from model_service.model.weights.files.meta.params import params_of
from model_service.model.weights.partition import is_linear, part_shape
from model_service.model.weights.quantization import FORMATS, GROUP_SIZE
from model_service.model.weights.source import Shard, WeightSource
from serving.errors import StartError

CPU = torch.device("cpu")
_ENDS = ("tok_embeddings", "norm", "output")
_PARTS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("attention_norm", "ffn_norm"),
)


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
    with new_folder(folder) as target:
        write_meta_into(target, source, files=files, quantization=quantization)


def write_meta_into(
    target: Target, source: WeightSource, *, files: int = 1, quantization: Quantization = "none"
) -> None:
    """`write_meta` into a folder that is open, and may hold finished files."""
    _check_groups(source, files, quantization)
    for number in range(files):
        name = f"consolidated.{number:02d}.pth"
        if target.is_finished(name):
            continue
        tensors = _tensors(source, number, files, quantization)
        target.write(name, partial(_save, tensors, target.staging / "tensors"))
    params = params_of(replace(source.config, quantization=quantization))
    text = json.dumps(params, indent=2) + "\n"
    target.write("params.json", lambda path: path.write_text(text, encoding="utf-8"))


def _save(tensors: Iterator[tuple[str, torch.Tensor]], staging: Path, path: Path) -> None:
    with mapped_tensors(staging, tensors) as mapped:
        torch.save(in_metas_order(mapped), path)


def _tensors(
    source: WeightSource, number: int, files: int, quantization: Quantization
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one of the files."""
    for name, weight in source.read_shard(Shard(number, files, torch.float32, CPU)):
        if quantization != "none" and is_linear(name):
            yield from FORMATS[quantization].quantize(weight).stored(name).items()
        else:
            yield name, weight.to(source.stored_dtype(name))


def in_metas_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the order of Meta's files, which torch.save keeps: the ends of the
    network, then its layers, in them w1, w2, w3.
    """

    def place(name: str) -> tuple[int, int, str]:
        if not name.startswith("layers."):
            return -1, _ENDS.index(name.split(".", maxsplit=1)[0]), name
        _, layer, part = name.split(".", 2)
        return int(layer), _PARTS.index(part.partition(".weight")[0]), part

    return {name: tensors[name] for name in sorted(tensors, key=place)}


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
