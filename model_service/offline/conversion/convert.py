"""Converts a model in any format that is read to Meta's or Hugging Face's, with checksums.

Weights go one by one from the source's mapped files to mapped temporary files, and from there into
the new file. So memory holds no more than one weight, and the disk needs room for the largest new
file twice.
"""

import functools
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llama.model_files import META
from model_service.model.config import ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.weights.conversion.write_hugging_face import (
    FILE_BYTES,
    write_hugging_face_into,
)
from model_service.model.weights.conversion.write_meta import write_meta_into
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import WeightSource
from model_service.offline.checksums import CHECKLIST, SHA256SUMS
from model_service.offline.conversion.companions import companions
from model_service.offline.conversion.observed_source import TYPES, ObservedSource
from model_service.offline.conversion.unfinished import UnfinishedFolder
from model_service.offline.stored_model import StoredModel, read_stored_model
from serving.errors import StartError
from serving.telemetry.progress import progress


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        form: meta or hf.
        files: files to divide the weights among in Meta's format; None: as many as Meta's source
            has, else 1.
        file_bytes: most bytes of a file in Hugging Face's format.
        dtype: the type of all new weights by name; None keeps each weight's own.
    """

    form: Literal["meta", "hf"]
    files: int | None = None
    file_bytes: int = FILE_BYTES
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
    files = options.files or (len(stored.files) if stored.form == META else 1)
    if options.form == "meta":
        _check_division(stored.config, files)
    weights = open_weights(source)
    dtype = None if options.dtype is None else TYPES[options.dtype]
    total = _stored_bytes(ObservedSource(weights, source, dtype, lambda _done: None))
    folder = UnfinishedFolder(target, _identity(stored, options), *_list_of(options))
    folder.check_room(total)
    with progress("converting", total) as advance:
        observed = ObservedSource(weights, source, dtype, advance)
        if options.form == "meta":
            write_meta_into(folder, observed, files=files)
        else:
            write_hugging_face_into(folder, observed, file_bytes=options.file_bytes)
    for file in companions(source):
        folder.write(file.name, functools.partial(shutil.copyfile, file))
    folder.finish()


def _stored_bytes(source: WeightSource) -> int:
    """Bytes of all weights, a tied output matrix twice: what a conversion passes through."""
    shapes = source.config.parameter_shapes()
    return sum(math.prod(shapes[name]) * source.stored_dtype(name).itemsize for name in shapes)


def _list_of(options: ConversionOptions) -> tuple[str, str]:
    """The name of the list of checksums, and their algorithm, which are those of the format."""
    return (CHECKLIST, "md5") if options.form == "meta" else (SHA256SUMS, "sha256")


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
