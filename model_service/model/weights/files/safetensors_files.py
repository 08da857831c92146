"""Opens the safetensors files of a Hugging Face folder: finds them, and maps their tensors.

A file begins with a header that names each tensor with its type, shape and place; it holds no code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model_service.model.errors import CheckpointError
from model_service.model.weights.files.meta_files import FETCH_AGAIN, READABLE
from model_service.model.weights.files.safetensors_index import INDEX, read_index

SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it. Its numbers are read when they are used."""

    path: Path
    values: torch.Tensor


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name: of `model.safetensors`, or of the files in the index.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts the index.
    """
    single = folder / SINGLE
    if single.exists():
        return _open(single)
    places = _places(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        for name, tensor in _open(folder / file).items():
            if places.get(name, file) != file:
                raise CheckpointError(
                    folder / file,
                    f"holds {name}, which {INDEX} places in {places[name]}",
                    FETCH_AGAIN,
                )
            if name in tensors:
                raise CheckpointError(
                    folder / file, f"holds {name}, like {tensors[name].path.name}", FETCH_AGAIN
                )
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise CheckpointError(
                folder / file, f"lacks {name}, which {INDEX} places there", FETCH_AGAIN
            )
    return tensors


def _places(folder: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, as the index states it."""
    index = folder / INDEX
    if not index.exists():
        _check_format(folder)
    return read_index(index)


def _check_format(folder: Path) -> None:
    """Raises CheckpointError: a folder has neither file by which its weights are found."""
    if part := next(folder.glob("model-*.safetensors"), None):
        raise CheckpointError(
            folder / INDEX, f"not found, though {part.name} is there", "download it, too"
        )
    if found := next(folder.glob("pytorch_model*.bin"), None):
        raise CheckpointError(
            folder,
            f"holds its weights as {found.name}, which may run code when it is read",
            "convert them once to safetensors: transformers.AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise CheckpointError(
        folder / SINGLE, f"not found, and neither is {INDEX}", "download one of them"
    )


def _open(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: StoredTensor(path, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise CheckpointError(
            path, f"is cut short, damaged, or no safetensors file ({error})", FETCH_AGAIN
        ) from error
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror or error}", READABLE
        ) from error
