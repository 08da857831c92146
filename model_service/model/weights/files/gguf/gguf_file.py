"""A model in a GGUF file, as a source of weights.

The file is memory-mapped, and only the blocks of this rank are dequantized, piece by piece. So
reading needs memory for one rank's weights, however large the file is. llama.cpp keeps wq and wk of
the architecture llama in Meta's order, in which neighbouring features rotate as a pair.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

from model_service.model.config import ModelConfig
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.errors import CheckpointError, shown_names, shown_shape
from model_service.model.weights.files.digest import digest
from model_service.model.weights.files.gguf.config import EMBEDDING, read_config
from model_service.model.weights.files.gguf.header import CONVERT_AGAIN, map_file, read_header
from model_service.model.weights.files.gguf.scaling import DIVISORS
from model_service.model.weights.files.gguf.tensors import StoredTensor, WorkerPool, map_tensors
from model_service.model.weights.files.read_parts import read_parts
from model_service.model.weights.partition import split_dimension
from model_service.model.weights.source import Allocate, Shard, new_memory


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file. Its shape has been checked; no weight has been read yet.

    Attributes:
        tensors: by Meta's names; a tied output matrix is the embedding.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type of the parameter `name` in the file; float32 holds dequantized codes exactly."""
        return self.tensors[name].dtype

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one rank, one parameter at a time, in the network's order.

        Raises:
            CheckpointError: after the last parameter, if any is not finite in the shard's dtype.
        """
        with WorkerPool() as pool:

            def copy(name: str, start: int, weight: torch.Tensor, upload: WeightUpload) -> None:
                dimension = split_dimension(name) or 0
                self.tensors[name].copy_part(dimension, start, weight, upload, pool)

            yield from read_parts(self.path, self.config, shard, allocate, copy)

    def fingerprint(self) -> str:
        """SHA-256 of the shape and of all weights as they are stored, hexadecimal.

        Reads all weights, as the format has no checksums.
        """
        # The type belongs to the name, because blocks of two types may have the same size.
        stored = {
            f"{name} {tensor.type.name}": torch.from_numpy(tensor.data)
            for name, tensor in self.tensors.items()
        }
        identity = f"{self.config!r} {digest(stored)}"
        return hashlib.sha256(identity.encode()).hexdigest()


def open_gguf(path: Path) -> GgufFile:
    """Opens and checks the GGUF file at `path`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than a Llama in
            types that are read; the message names the file and the fix.
    """
    data = map_file(path)
    header = read_header(path, data.data)
    config = read_config(path, header, data)
    stored = map_tensors(path, header.tensors, data)
    names = _names(path, stored, config)
    _check_tensors(path, stored, names, config)
    return GgufFile(path, config, {name: stored[names[name]] for name in names})


def _names(path: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, str]:
    """The name in the file of each parameter, by Meta's names.

    Raises:
        CheckpointError: the number of layers is not as stated. This comes before any list that is
            as long as the metadata states.
    """
    layers = {found[1] for name in stored if (found := re.match(r"blk\.(\d+)\.", name))}
    if len(layers) != config.n_layers:
        raise CheckpointError(
            path,
            f"holds {len(layers)} layers and states llama.block_count {config.n_layers}",
            CONVERT_AGAIN,
        )
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    names = {
        name: str(known.get_name(name, try_suffixes=(".weight",)))
        for name in config.parameter_shapes()
    }
    return names | ({"output.weight": EMBEDDING} if config.tied_embeddings else {})


def _check_tensors(
    path: Path,
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    config: ModelConfig,
) -> None:
    """Raises CheckpointError unless the file holds exactly the network's parameters."""
    if missing := sorted(set(names.values()) - stored.keys()):
        raise CheckpointError(path, f"lacks {shown_names(missing)}", CONVERT_AGAIN)
    if unexpected := sorted(stored.keys() - set(names.values()) - {DIVISORS}):
        biases = ": biases, which Llama does not have" * unexpected[0].endswith(".bias")
        raise CheckpointError(
            path,
            f"also holds {shown_names(unexpected)}{biases}",
            "use a model with the network of Llama, without additions",
        )
    for name, shape in config.parameter_shapes().items():
        found = stored[names[name]].shape
        if found != shape:
            raise CheckpointError(
                path,
                f"{names[name]} is {shown_shape(found)}; its metadata makes it "
                f"{shown_shape(shape)}",
                CONVERT_AGAIN,
            )
