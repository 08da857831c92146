"""Opens the weights that a path holds, in whatever format they are."""

from pathlib import Path

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.gguf_file import open_gguf
from model_service.model.weights.files.hugging_face import open_hugging_face
from model_service.model.weights.files.meta_checkpoint import open_checkpoint
from model_service.model.weights.files.safetensors_files import SINGLE
from model_service.model.weights.files.safetensors_index import INDEX
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
    if not path.is_dir():
        if path.suffix == ".gguf":
            return open_gguf(path)
        raise CheckpointError(path, "is a file of a kind that is not read", ACCEPTED)
    # Some Hugging Face folders hold a params.json as well.
    if any(path.glob("consolidated.*.pth")):
        return open_checkpoint(path, verify=verify)
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return open_hugging_face(path)
    if (path / "params.json").exists():
        return open_checkpoint(path, verify=verify)
    if files := sorted(path.glob("*.gguf")):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(
                path, f"holds several GGUF files: {names}", "name one of them, not the folder"
            )
        return open_gguf(files[0])
    if (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return open_hugging_face(path)  # which says what is missing
    if found := next(path.glob("pytorch_model*.bin"), None):
        raise CheckpointError(path, f"holds {found.name} without a config.json", ACCEPTED)
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            path,
            "holds an adapter, not a model",
            "merge it into its model with peft, and serve that",
        )
    raise CheckpointError(path, "holds no checkpoint", ACCEPTED)
