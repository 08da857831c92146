"""Numbers between host and device without waiting for the device.

On CUDA they pass through pinned buffers from PyTorch's cache, which hands a buffer out again only
when the copies from it or into it are done: nothing is ever overwritten on its way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 16  # bytes; enough for any type


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[torch.Tensor]:
    """The arrays as tensors on `device`, of the same shapes and types.

    On the CPU they share the arrays' memory; to any other device one copy takes them all.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return upload_packed(device, arrays)


def upload_packed(device: torch.device, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """`upload` by one copy of all bytes."""
    begins = [0]
    for array in arrays:
        begins.append(begins[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    staged = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    staging = staged.numpy()
    for begin, array in zip(begins, arrays, strict=False):
        own = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        staging[begin : begin + array.nbytes] = own
    packed = staged.to(device, non_blocking=True)
    return [
        packed[begin : begin + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for begin, array in zip(begins, arrays, strict=False)
    ]


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Asks for copies of `tensors`, all on one device, as they are now on its stream."""
        self._copied: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors[0].device.type == "cuda":
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            ]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types
            self._copied.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once they are there; other threads run meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
