"""Converts a model in any format that is read to Meta's or Hugging Face's.

Weights go one by one from the source's mapped files to mapped temporary files, and from there into
the new file. So memory holds no more than one weight, and the disk needs room for the largest new
file twice.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.weights.finite import check_finite, extremes
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.partition import part_shape
from model_service.model.weights.source import WeightSource
from model_service.offline.checksums import CHECKLIST, SHA256SUMS
from model_service.offline.conversion.companions import companions
from model_service.offline.conversion.hugging_face_format import (
    INDEX,
    FilePlan,
    hugging_face_config,
    hugging_face_name,
    hugging_face_weight,
    index_of,
    plan_files,
    stored_parameters,
)
from model_service.offline.conversion.mapped_tensors import mapped_tensors
from model_service.offline.conversion.meta_format import meta_file_names, meta_order, meta_params
from model_service.offline.conversion.unfinished import UnfinishedFolder
from model_service.offline.conversion.weight_types import weight_types
from model_service.offline.stored_model import META, StoredModel, read_stored_model
from serving.errors import StartError
from serving.telemetry.progress import progress

Form = Literal["meta", "hf"]
_CPU = torch.device("cpu")
_Named = tuple[str, torch.Tensor]
_Save = Callable[[dict[str, torch.Tensor], Path], None]


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        form: meta or hf.
        files: files of weights to write; None leaves it to the format.
        dtype: the type of all new weights by name; None keeps each weight's own.
    """

    form: Form
    files: int | None = None
    dtype: str | None = None


def convert(source: Path, target: Path, options: ConversionOptions) -> None:
    """Writes the model at `source` to the folder `target`.

    Interrupted and started again, it keeps the files that are finished.

    Raises:
        StartError: the source cannot be read or is quantized, or the target is in use, too small,
            or cannot be written.
    """
    stored = read_stored_model(source)
    if stored.config.quantization != "none":
        problem = f"is quantized to {stored.config.quantization}"
        raise CheckpointError(source, problem, "convert the original")
    weights = open_weights(source)
    _Conversion(stored, weights, target, options).run()


class _Conversion:
    """One conversion."""

    def __init__(
        self, stored: StoredModel, weights: WeightSource, target: Path, options: ConversionOptions
    ) -> None:
        self._stored = stored
        self._weights = weights
        self._config = weights.config
        self._form = options.form
        self._types = weight_types(stored, self._config, options.dtype)
        self._files = options.files
        if options.form == "meta":
            self._files = options.files or (len(stored.files) if stored.form == META else 1)
            _check_division(self._config, self._files)
        in_list = (CHECKLIST, "md5") if options.form == "meta" else (SHA256SUMS, "sha256")
        self._target = UnfinishedFolder(target, _identity(stored, options), *in_list)

    def run(self) -> None:
        write = self._write_meta if self._form == "meta" else self._write_hugging_face
        shapes = self._config.parameter_shapes()
        total = sum(math.prod(shape) * self._types[name].itemsize for name, shape in shapes.items())
        self._target.check_room(total)
        with progress("converting", total) as advance:
            write(advance)
        for file in companions(self._stored.path):
            self._write(file.name, functools.partial(shutil.copyfile, file))
        self._target.finish()

    def _write_meta(self, advance: Callable[[int], None]) -> None:
        assert self._files is not None  # noqa: S101  # set for this format
        names = meta_file_names(self._files)
        for number, name in enumerate(names):
            if self._target.is_finished(name):
                advance(self._part_bytes(len(names)))
                continue
            self._write_weights(name, self._read(number, len(names), advance), self._save_meta)
        self._write_json("params.json", meta_params(self._config))

    def _write_hugging_face(self, advance: Callable[[int], None]) -> None:
        shapes = stored_parameters(self._config)
        itemsizes = {name: self._types[name].itemsize for name in shapes}
        plans = plan_files(shapes, itemsizes, self._files)
        weights = self._read(0, 1, advance)
        for plan in plans:
            # Finished files' weights are read, too, because a source is read in its order.
            own = self._named(plan, weights)
            if self._target.is_finished(plan.name):
                for _ in own:
                    pass
                continue
            self._write_weights(plan.name, own, _save_safetensors)
        if len(plans) > 1:
            total = sum(math.prod(shapes[name]) * itemsizes[name] for name in shapes)
            self._write_json(INDEX, index_of(plans, total))
        largest = max(self._types.values(), key=list(self._types.values()).count)
        name = str(largest).removeprefix("torch.")
        self._write_json("config.json", hugging_face_config(self._config, name))

    def _named(self, plan: FilePlan, weights: Iterator[_Named]) -> Iterator[_Named]:
        """The next weights, which are those of `plan`, in Hugging Face's form."""
        for _ in plan.parameters:
            name, weight = next(weights)
            yield hugging_face_name(name), hugging_face_weight(name, weight, self._config)

    def _read(self, rank: int, shards: int, advance: Callable[[int], None]) -> Iterator[_Named]:
        """A rank's weights, each in its type."""
        kinds = set(self._types.values())
        # Numbers of all types that are read pass through float32 unchanged.
        common = kinds.pop() if len(kinds) == 1 else torch.float32
        for name, weight in self._weights.read_shard(rank, shards, common, _CPU):
            converted = weight.to(self._types[name])
            check_finite(self._stored.path, {name: extremes(converted)})
            yield name, converted
            advance(converted.nbytes)

    def _write_weights(self, name: str, weights: Iterator[_Named], save: _Save) -> None:
        def write(path: Path) -> None:
            with mapped_tensors(self._target.partial / "tensors", weights) as tensors:
                try:
                    save(dict(tensors), path)
                except (RuntimeError, SafetensorError) as error:  # such as a full disk
                    raise OSError(str(error)) from error

        self._target.write(name, write)

    def _save_meta(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        torch.save({name: tensors[name] for name in meta_order(self._config)}, path)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        self._write(name, lambda path: path.write_text(text, "utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if not self._target.is_finished(name):
            self._target.write(name, write)

    def _part_bytes(self, parts: int) -> int:
        """Bytes of the weights in one of Meta's files."""
        return sum(
            math.prod(part_shape(name, shape, parts)) * self._types[name].itemsize
            for name, shape in self._config.parameter_shapes().items()
        )


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # transformers refuses files that do not say that they are PyTorch's.
    save_file(tensors, path, metadata={"format": "pt"})


def _check_division(config: ModelConfig, files: int) -> None:
    if indivisible := config.indivisible_by(files):
        raise StartError(
            f"{files} files do not divide {', '.join(indivisible)}. To fix: --files with one of "
            f"{', '.join(map(str, config.shard_counts()))}"
        )


def _identity(stored: StoredModel, options: ConversionOptions) -> dict[str, Any]:
    """The source and the options, by which a conversion that goes on is recognised."""
    files = {
        str(file.path.resolve()): [file.size, file.path.stat().st_mtime_ns] for file in stored.files
    }
    return {"source": files, "options": asdict(options)}
