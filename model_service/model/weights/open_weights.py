"""Opens the weights that a path holds, in whatever format they are."""

from pathlib import Path

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.gguf_file import open_gguf
from model_service.model.weights.files.hugging_face import open_hugging_face
from model_service.model.weights.files.meta_checkpoint import open_checkpoint
from model_service.model.weights.files.weight_files import (
    GGUF,
    HUGGING_FACE,
    META,
    refuse_other_weights,
    weight_format,
)
from model_service.model.weights.source import WeightSource

ACCEPTED = (
    "name a folder with Meta's params.json and consolidated.*.pth, or with Hugging Face's "
    "config.json and model.safetensors (or model.safetensors.index.json and its files), or a GGUF "
    "file"
)


def open_weights(path: Path, *, verify: bool = True) -> WeightSource:
    """Opens and checks the weights at `path`.

    Args:
        path: a folder in Meta's or Hugging Face's format, or with one GGUF file; or that file. In a
            folder with several, Meta's goes before Hugging Face's, and that before GGUF.
        verify: compare every tensor with its checksum, if the format has checksums.

    Raises:
        CheckpointError: there are no weights, or they are damaged or not supported; the message
            names the file and the fix.
    """
    if not path.exists():
        raise CheckpointError(path, "not found", ACCEPTED)
    form = weight_format(path)
    if form == META:
        return open_checkpoint(path, verify=verify)
    if form == HUGGING_FACE:
        return open_hugging_face(path)
    if form == GGUF:
        return open_gguf(_gguf_file(path))
    if not path.is_dir():
        raise CheckpointError(path, "is a file of a kind that is not read", ACCEPTED)
    if found := next(path.glob("pytorch_model*.bin"), None):
        raise CheckpointError(path, f"holds {found.name} without a config.json", ACCEPTED)
    refuse_other_weights(path)
    raise CheckpointError(path, "holds no checkpoint", ACCEPTED)


def _gguf_file(path: Path) -> Path:
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(
            path, f"holds several GGUF files: {names}", "name one of them, not the folder"
        )
    return files[0]
