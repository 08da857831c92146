"""Tensors in temporary files instead of memory.

torch.save and safetensors write a file from tensors that all exist at once. Mapped from files, they
take no memory that the system cannot get back, however large the new file is.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def mapped_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Copies of `tensors`, by name and in their order, each in a file of the new `folder`.

    The folder is deleted at the end of the block.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted conversion left
    folder.mkdir(parents=True)
    try:
        yield {name: _mapped(folder / f"{name}.tensor", tensor) for name, tensor in tensors}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _mapped(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(os, "posix_fallocate"):
        # A disk that is full is an error now; found while the mapped pages are written, it would
        # end the process.
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
    copy = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)
