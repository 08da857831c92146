"""Reads Meta's checkpoints: any number of shard files onto any number of ranks.

Files are memory-mapped and only the slices of this rank are copied, so reading costs one rank's
weights in memory however large the files are. Llama 2 splits `tok_embeddings` on dimension 1
(fairscale's ParallelEmbedding), unlike Llama 3.
"""

import hashlib
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model_service.model.config import VOCAB_SIZE_FROM_EMBEDDING, ModelConfig, read_params
from model_service.model.errors import CheckpointError
from model_service.model.quantization import FORMATS, FP8, GROUP_SIZE, QuantizedWeight
from model_service.model.upload import Upload

SPLIT_DIMENSION = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}
# Computed from the shape of the network; Meta's files carry it, some conversions leave it out.
DERIVED = {"rope.freqs"}
FLOAT_TYPES = {torch.float32, torch.float16, torch.bfloat16}
FETCH_AGAIN = "copy or download it again"
READABLE = "make it a file that this user may read"
_CHECKSUM_THREADS = 16
_READ_BYTES = 2**22


StoredWeight = torch.Tensor | QuantizedWeight


def is_linear(name: str) -> bool:
    """Whether the parameter `name` multiplies, and so may be quantized."""
    return split_dimension(name) is not None and name != "tok_embeddings.weight"


def split_dimension(name: str) -> int | None:
    """The dimension on which Meta's files split the parameter `name`; None: each file has all."""
    return SPLIT_DIMENSION.get(name.removesuffix(".weight").rpartition(".")[2])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its shape is known and checked, no weight has been read yet."""

    folder: Path
    config: ModelConfig
    files: tuple[dict[str, StoredWeight], ...]

    @property
    def parameters(self) -> int:
        """Number of weights in the network."""
        shapes = self.config.parameter_shapes().values()
        return sum(torch.Size(shape).numel() for shape in shapes)

    def shard_parameters(self, shards: int, *, linear: bool | None = None) -> int:
        """Number of weights that one of `shards` ranks holds; `linear` counts those or the rest."""
        return sum(
            torch.Size(shape).numel() // (1 if split_dimension(name) is None else shards)
            for name, shape in self.config.parameter_shapes().items()
            if linear is None or is_linear(name) is linear
        )

    def read_shard(
        self, rank: int, shards: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `rank` among `shards`, one parameter at a time, in the network's order."""
        upload = Upload(device)
        for name, shape in self.config.parameter_shapes().items():
            dimension = split_dimension(name)
            if dimension is None:
                weight = torch.empty(shape, dtype=dtype, device=device)
                upload.copy(self.files[0][name].narrow(0, 0, *shape), weight)
            else:
                size = shape[dimension] // shards
                own = [*shape]
                own[dimension] = size
                weight = torch.empty(own, dtype=dtype, device=device)
                self._read(name, dimension, rank * size, weight, upload)
            yield name, weight

    def _read(
        self, name: str, dimension: int, start: int, weight: torch.Tensor, upload: Upload
    ) -> None:
        """Fills `weight` with a parameter's elements from `start` on along `dimension`."""
        end = start + weight.shape[dimension]
        offset = 0
        for file in self.files:
            part = file[name]
            size = part.shape[dimension]
            low, high = max(start, offset), min(end, offset + size)
            if low < high:
                target = weight.narrow(dimension, low - start, high - low)
                if isinstance(part, torch.Tensor):
                    upload.copy(part.narrow(dimension, low - offset, high - low), target)
                else:  # half or a quarter of the bytes, if the device dequantizes them
                    moved = part.moved(upload.moved)
                    target.copy_(moved.narrow(dimension, low - offset, high - low))
            offset += size

    def fingerprint(self) -> str:
        """SHA-256 of the shape and of each tensor's checksum, hexadecimal.

        A .pth file is a zip archive: its directory already holds the CRC-32 of every tensor, so
        the weights are identified without reading them.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for path in _weight_files(self.folder):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    inner = entry.filename.partition("/")[2]
                    # Differs between two saves of the same weights.
                    if inner != ".data/serialization_id":
                        record = struct.pack("<IQ", entry.CRC, entry.file_size)
                        digest.update(inner.encode() + record)
        return digest.hexdigest()


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Opens and checks the checkpoint in `folder`: `params.json` and `consolidated.*.pth`.

    Args:
        folder: the checkpoint.
        verify: compare every tensor with its checksum, which reads each file once.

    Raises:
        CheckpointError: a file is missing, damaged, holds code, or contradicts another; the
            message names the file and what to do.
    """
    config = read_params(folder / "params.json")
    paths = _weight_files(folder)
    for path in paths:
        _check_archive(path, verify=verify)
    files = tuple(_open_weights(path) for path in paths)
    embedding = files[0].get("tok_embeddings.weight")
    if config.vocab_size == VOCAB_SIZE_FROM_EMBEDDING and embedding is not None:
        config = replace(config, vocab_size=embedding.shape[0])
    for path, tensors in zip(paths, files, strict=True):
        _check_file(path, tensors, config, len(files))
    return Checkpoint(folder, config, tuple(_stored_weights(file, config) for file in files))


def _stored_weights(
    tensors: dict[str, torch.Tensor], config: ModelConfig
) -> dict[str, StoredWeight]:
    """A file's parameters, each with the tensors that belong to it."""
    kind = FORMATS.get(config.quantization)
    return {
        name: kind.from_file(name, tensors) if kind and is_linear(name) else tensors[name]
        for name in config.parameter_shapes()
    }


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise CheckpointError(
            folder / "consolidated.00.pth",
            "not found",
            "name the folder that holds params.json and consolidated.*.pth",
        )
    for number, path in enumerate(paths):
        expected = f"consolidated.{number:02d}.pth"
        if path.name != expected:
            raise CheckpointError(
                folder / expected, f"not found, though {path.name} is there", FETCH_AGAIN
            )
    return paths


def _check_archive(path: Path, *, verify: bool) -> None:
    """Raises CheckpointError unless `path` is a whole zip archive, with `verify` undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        damaged = _damaged(path, names) if verify else None
    except zipfile.BadZipFile:
        raise CheckpointError(
            path,
            "is cut short, or not in the format that torch.save writes since version 1.6",
            f"{FETCH_AGAIN}; a file in the old format: torch.save(torch.load(...)) it once",
        ) from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from error
    if damaged is not None:
        raise CheckpointError(path, f"is damaged: {damaged} fails its checksum", FETCH_AGAIN)


def _damaged(path: Path, names: list[str]) -> str | None:
    """The first of the tensors `names` that fails its checksum.

    Several threads, as one computes checksums more slowly than a good disk reads. What they read
    stays in the page cache, where loading finds it.
    """
    threads = min(_CHECKSUM_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        shares = [names[i::threads] for i in range(threads)]
        found = pool.map(_first_damaged, [path] * threads, shares)
        damaged = {name for name in found if name is not None}
    return next((name for name in names if name in damaged), None)


def _first_damaged(path: Path, names: list[str]) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                with archive.open(name) as record:
                    while record.read(_READ_BYTES):
                        pass
            except zipfile.BadZipFile:
                return name
    return None


def _open_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path,
            f"refused: it holds {_forbidden_object(error)}, not only tensors, and could run code",
            "use the file from Meta, or save the plain state dictionary",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        problem = f"cannot be read as a checkpoint: {error}"
        raise CheckpointError(path, problem, FETCH_AGAIN) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "holds no dictionary of tensors", FETCH_AGAIN)
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(path, f"{name!r} is not a tensor", FETCH_AGAIN)
    return content


def _forbidden_object(error: pickle.UnpicklingError) -> str:
    """The name of what the unpickler refused, such as `posix.system`."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else "Python objects"


def _check_file(
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
        shape = _file_shape(name, whole, files)
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


def _file_shape(name: str, shape: tuple[int, ...], files: int) -> tuple[int, ...]:
    dimension = split_dimension(name)
    if dimension is None:
        return shape
    return (*shape[:dimension], shape[dimension] // files, *shape[dimension + 1 :])


def _dimensions(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
