"""Reads Meta's checkpoints: any number of shard files onto any number of ranks.

Files are memory-mapped and only the slices of this rank are copied. So reading needs memory for one
rank's weights, however large the files are.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model_service.model.config import VOCAB_SIZE_FROM_EMBEDDING, ModelConfig
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta.checks import (
    ONE_CHECKPOINT,
    check_copies,
    check_tensors,
)
from model_service.model.weights.files.meta.files import (
    check_archive,
    open_tensors,
)
from model_service.model.weights.files.meta.params import read_params
from model_service.model.weights.files.read_parts import read_parts
from model_service.model.weights.files.weight_files import shard_files
from model_service.model.weights.partition import (
    EMBEDDING,
    is_linear,
    split_dimension,
    splits_vocabulary,
)
from model_service.model.weights.quantization import FORMATS, QuantizedWeight
from model_service.model.weights.source import Allocate, Shard, new_memory

StoredWeight = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. Its shape has been checked; no weight has been read yet."""

    folder: Path
    config: ModelConfig
    files: tuple[dict[str, StoredWeight], ...]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type of the parameter `name` in the files; float32 if it is quantized."""
        stored = self.files[0][name]
        return stored.dtype if isinstance(stored, torch.Tensor) else torch.float32

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one rank, one parameter at a time, in the network's order.

        Raises:
            CheckpointError: after the last parameter, if any is not finite in the shard's dtype.
        """
        return read_parts(self.folder, self.config, shard, allocate, self._copy)

    def _copy(self, name: str, start: int, weight: torch.Tensor, upload: WeightUpload) -> None:
        dimension = split_dimension(name)
        if dimension is None:
            upload.copy(self.files[0][name].narrow(0, 0, *weight.shape), weight)
        elif name == EMBEDDING and self._splits_vocabulary:
            self._read_rows(start, weight, upload)
        else:
            self._join_parts(name, dimension, start, weight, upload)

    def _join_parts(
        self, name: str, dimension: int, start: int, weight: torch.Tensor, upload: WeightUpload
    ) -> None:
        """Fills `weight` from the files that hold elements of it along `dimension`."""
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
                else:  # the device dequantizes: a half or a quarter of the bytes to move
                    moved = part.moved(upload.moved)
                    target.copy_(moved.narrow(dimension, low - offset, high - low))
            offset += size

    @property
    def _splits_vocabulary(self) -> bool:
        return splits_vocabulary(
            tuple(self.files[0][EMBEDDING].shape), self.config, len(self.files)
        )

    def _read_rows(self, start: int, weight: torch.Tensor, upload: WeightUpload) -> None:
        """Fills `weight` with the embedding's columns from `start` on; each file has some rows."""
        offset = 0
        for file in self.files:
            part = file[EMBEDDING].narrow(1, start, weight.shape[1])
            upload.copy(part, weight.narrow(0, offset, len(part)))
            offset += len(part)

    def fingerprint(self) -> str:
        """SHA-256 of the shape and of each tensor's checksum, hexadecimal.

        A .pth file is a zip archive whose directory holds the CRC-32 of every tensor, so the
        weights are identified without being read.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for path in shard_files(self.folder):
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
            message names the file and the fix.
    """
    config = read_params(folder / "params.json")
    paths = shard_files(folder)
    for path in paths:
        check_archive(path, verify=verify)
    files = tuple(open_tensors(path) for path in paths)
    embedding = files[0].get("tok_embeddings.weight")
    unset = config.vocab_size == VOCAB_SIZE_FROM_EMBEDDING
    if unset and embedding is not None and embedding.ndim and len(embedding):
        config = replace(config, vocab_size=len(embedding))
    for path, tensors in zip(paths, files, strict=True):
        check_tensors(path, tensors, config, len(files))
        if tensors[EMBEDDING].shape != files[0][EMBEDDING].shape:
            problem = f"splits {EMBEDDING} otherwise than {paths[0].name}"
            raise CheckpointError(path, problem, ONE_CHECKPOINT)
    check_copies(paths, files, config)
    return Checkpoint(folder, config, tuple(_stored_weights(file, config) for file in files))


def _stored_weights(
    tensors: dict[str, torch.Tensor], config: ModelConfig
) -> dict[str, StoredWeight]:
    """A file's parameters, quantized ones with all their tensors."""
    kind = FORMATS.get(config.quantization)
    return {
        name: kind.from_file(name, tensors) if kind and is_linear(name) else tensors[name]
        for name in config.parameter_shapes()
    }
