"""Opens the safetensors files of a Hugging Face folder, and maps their tensors.

A file begins with a header that names each tensor with its type, shape and place; it holds no code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from model_service.model.errors import FETCH_AGAIN, READABLE, CheckpointError
from model_service.model.weights.files.weight_files import INDEX, SINGLE, tensor_places

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it. Its numbers are read when they are used."""

    path: Path
    values: "torch.Tensor"


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name: of `model.safetensors`, or of the files in the index.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts the index.
    """
    single = folder / SINGLE
    if single.exists():
        return _open(single)
    places = tensor_places(folder)
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


def _open(path: Path) -> dict[str, StoredTensor]:
    with opened(path, "pt") as file:
        return {name: StoredTensor(path, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping


@contextmanager
def opened(path: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """The file at `path`, whose sizes the library compares with its header.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """
    try:
        # Opened by hand first: the library's own error does not say why it cannot read a file.
        path.open("rb").close()
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            path, f"is cut short, damaged, or no safetensors file ({error})", FETCH_AGAIN
        ) from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}", READABLE) from error
