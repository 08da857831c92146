"""The format of the weights that a path holds, told by the names of files alone."""

from pathlib import Path
from typing import Final

META: Final = "Meta's format"
HUGGING_FACE: Final = "Hugging Face's format"
GGUF: Final = "GGUF"
ACCEPTED = (
    "name a folder with Meta's params.json and consolidated.*.pth, or with Hugging Face's "
    "config.json and model.safetensors (or model.safetensors.index.json and its files), or a GGUF "
    "file"
)


def weight_format(path: Path) -> str | None:
    """The format of the weights at `path`, a folder or a file; None if there are none."""
    if not path.is_dir():
        return GGUF if path.suffix == ".gguf" else None
    # Some Hugging Face folders hold a params.json as well.
    if any(path.glob("consolidated.*.pth")):
        return META
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return HUGGING_FACE
    # Folders with GGUF files often have a config.json as well.
    if (path / "params.json").exists() and not (path / "config.json").exists():
        return META
    if any(path.glob("*.gguf")):
        return GGUF
    return HUGGING_FACE if (path / "config.json").exists() else None


def no_weights(path: Path) -> str:
    """The reason why `weight_format` finds none at `path`."""
    if not path.exists():
        return "not found"
    return "holds no checkpoint" if path.is_dir() else "is a file of a kind that is not read"
