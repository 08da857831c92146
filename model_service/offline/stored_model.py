"""A model as the headers of its files describe it, in any format. Imports no PyTorch.

Reading takes milliseconds, because no weight is read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llama.model_files import HUGGING_FACE, META
from model_service.model.config import VOCAB_SIZE_FROM_EMBEDDING, ModelConfig
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.hugging_face_config import read_config
from model_service.model.weights.files.meta.params import read_params
from model_service.model.weights.files.weight_files import weight_files
from model_service.offline.headers.gguf import read_gguf_config, read_gguf_header
from model_service.offline.headers.pth import read_pth_header
from model_service.offline.headers.safetensors import read_safetensors_header
from model_service.offline.headers.tensor_header import TensorHeader

# A parameter of a layer, in the names of Hugging Face, Meta and llama.cpp.
_LAYER = re.compile(r"(?:model\.layers|layers|blk)\.(\d+)\.")
READERS: Mapping[str, Callable[[Path], list[TensorHeader]]] = {
    ".pth": read_pth_header,
    ".safetensors": read_safetensors_header,
    ".gguf": read_gguf_header,
}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of weights.

    Attributes:
        path: its place.
        size: bytes.
        tensors: by its header.
    """

    path: Path
    size: int
    tensors: tuple[TensorHeader, ...]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on disk.

    Attributes:
        path: the folder, or the GGUF file.
        form: the name of its format.
        config: the network's shape.
        files: those with weights.
    """

    path: Path
    form: str
    config: ModelConfig
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files with weights."""
        return sum(file.size for file in self.files)


def read_stored_model(path: Path) -> StoredModel:
    """The model in the folder, or in the GGUF file, `path`.

    Raises:
        CheckpointError: there is none, a file is missing or damaged, or its architecture is not
            served; the message names the file and the fix.
    """
    form, files = weight_files(path)
    if form == META:
        config = read_params(path / "params.json")
    elif form == HUGGING_FACE:
        config = read_config(path / "config.json")
    else:
        config = read_gguf_config(files[0])
    stored = tuple(_read_file(file) for file in files)
    _check_layers(path, stored, config)
    if config.vocab_size == VOCAB_SIZE_FROM_EMBEDDING:
        config = replace(config, vocab_size=_embedding_rows(stored))
    return StoredModel(path, form, config, stored)


def _read_file(path: Path) -> StoredFile:
    return StoredFile(path, path.stat().st_size, tuple(READERS[path.suffix](path)))


def _check_layers(path: Path, files: tuple[StoredFile, ...], config: ModelConfig) -> None:
    """Raises CheckpointError if the number of layers is not as stated.

    This comes before any list that is as long as the configuration states.
    """
    names = (tensor.name for file in files for tensor in file.tensors)
    layers = {found[1] for name in names if (found := _LAYER.match(name))}
    if len(layers) != config.n_layers:
        raise CheckpointError(
            path,
            f"holds {len(layers)} layers, and its configuration states {config.n_layers}",
            "use the configuration that came with these weights",
        )


def _embedding_rows(files: tuple[StoredFile, ...]) -> int:
    for tensor in files[0].tensors:
        if tensor.name == "tok_embeddings.weight" and tensor.shape:
            return tensor.shape[0]
    problem = "lacks tok_embeddings.weight"
    raise CheckpointError(files[0].path, problem, "use the params.json that came with this file")
