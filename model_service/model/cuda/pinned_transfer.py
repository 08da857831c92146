"""Copies between host and device for which neither waits: of a step's numbers, and of weights.

On CUDA they pass through page-locked memory from PyTorch's cache, which hands memory out again only
when the copies from it or into it are done: nothing is overwritten while it is copied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 16  # bytes; enough for any type
# Numbers that are converted at once: PyTorch divides larger pieces among threads (GRAIN_SIZE in
# aten/src/ATen/TensorIterator.h), which on a busy machine wait for each other at every piece.
_CONVERTED_AT_ONCE = 2**15 - 1
BUFFER_BYTES = 64 * 2**20  # each; long enough that what a copy costs to start does not count


class Fence:
    """A moment on the device's stream that the host can wait for; on a CPU it has passed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # torch has no types

    def record(self) -> None:
        """Sets the moment: when all that was enqueued so far is done."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Returns after the moment, at once if none was recorded. Other threads run meanwhile."""
        if self._event is not None:
            self._event.synchronize()


def pinned(device: torch.device, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """The arrays in the host's memory, in one page-locked piece if `device` is a CUDA device."""
    return _views(_packed(device, arrays), arrays)


def upload(device: torch.device, *arrays: NDArray[Any]) -> list[torch.Tensor]:
    """The arrays as tensors on `device`, of the same shapes and types.

    On the CPU they share the arrays' memory; to any other device one copy brings them all.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return upload_packed(device, arrays)


def upload_packed(device: torch.device, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """`upload` by one copy of all bytes."""
    return _views(_packed(device, arrays).to(device, non_blocking=True), arrays)


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Asks for copies of `tensors`, all on one device, as they are now on its stream."""
        device = tensors[0].device
        self._copied = Fence(device)
        self._tensors = list(tensors)
        if device.type == "cuda":
            self._tensors = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            ]
        self._copied.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once they are there."""
        self._copied.wait()
        return self._tensors


class WeightUpload:
    """Copies weights from memory-mapped files to one device, through two small buffers.

    A copy from mapped memory would go through a buffer of the driver's, piece by piece, each piece
    read from the disk while the device waits. Here the device fetches one page-locked buffer while
    the processor fills the other: with several threads, as PyTorch copies, so that as many pages
    are read ahead at once. The buffers are all that the host ever holds.
    """

    def __init__(self, device: torch.device, buffer_bytes: int | None = None) -> None:
        """Makes the buffers: of `buffer_bytes` each, or of a size for `device`, 0 on the CPU.

        Without buffers, copies go straight to their target.
        """
        if buffer_bytes is None:
            buffer_bytes = 0 if device.type == "cpu" else BUFFER_BYTES
        self._device = device
        self._buffers = [_page_locked(device, buffer_bytes) for _ in range(2) if buffer_bytes]
        self._fetched = [Fence(device) for _ in self._buffers]
        self._next = 0

    @property
    def is_direct(self) -> bool:
        """Whether copies go straight to their target, without buffers."""
        return not self._buffers

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Fills `target`, a tensor or a part of one on the device, with `source` of the host.

        Args:
            source: of any dtype and strides; may be a part of a mapped file.
            target: of the same shape and any dtype. Work that is given to the device afterwards
                finds it filled.
        """
        if not self._buffers:
            _convert(source, target)
            return
        size = len(self._buffers[0])
        rows = max(1, size * len(source) // (source.numel() * source.itemsize))
        for piece, part in zip(torch.split(source, rows), torch.split(target, rows), strict=True):
            self._send(piece, part)

    def moved(self, source: torch.Tensor) -> torch.Tensor:
        """`source` on the device: itself if that is the host."""
        if not self._buffers:
            return source
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self.copy(source, target)
        return target

    def _send(self, piece: torch.Tensor, target: torch.Tensor) -> None:
        """Copies `piece` into a buffer, and lets the device fetch it into `target`."""
        turn, self._next = self._next, 1 - self._next
        self._fetched[turn].wait()
        size = piece.numel() * piece.itemsize
        if size > len(self._buffers[turn]):
            self._buffers[turn] = _page_locked(self._device, size)
        staged = self._buffers[turn][:size].view(piece.dtype).view(piece.shape)
        staged.copy_(piece)
        # Not blocking, so that a conversion to another dtype happens on the device.
        target.copy_(staged, non_blocking=True)
        self._fetched[turn].record()


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target.copy_(source)`: between the 16-bit types by float32, because PyTorch has no vector
    instructions for the direct way, which takes three times as long.
    """
    if {source.dtype, target.dtype} != {torch.float16, torch.bfloat16}:
        target.copy_(source)
        return
    rows = max(1, _CONVERTED_AT_ONCE * len(source) // source.numel())
    for piece, part in zip(torch.split(source, rows), torch.split(target, rows), strict=True):
        part.copy_(piece.float())


def _page_locked(device: torch.device, size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _packed(device: torch.device, arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
    """The arrays' bytes in the host's memory, one behind the other."""
    begins = _begins(arrays)
    packed = _page_locked(device, begins[-1])
    values = packed.numpy()
    for begin, array in zip(begins, arrays, strict=False):
        own = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        values[begin : begin + array.nbytes] = own
    return packed


def _views(packed: torch.Tensor, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """The arrays' parts of `packed`, in their shapes and types."""
    return [
        packed[begin : begin + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for begin, array in zip(_begins(arrays), arrays, strict=False)
    ]


def _begins(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each array begins in a packed piece, and the length of the piece."""
    begins = [0]
    for array in arrays:
        begins.append(begins[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return begins
