"""Weights from memory-mapped files to a device, through two small buffers on the host.

A copy from mapped memory would go through a buffer of the driver's, piece by piece, each piece read
from the disk while the device waits. Here the device fetches one page-locked buffer while the
processor fills the other: with several threads, as PyTorch copies, so that as many pages are read
ahead at once and no thread of our own is needed. The buffers are all that the host ever holds.
"""

import torch

BUFFER_BYTES = 64 * 2**20  # each; long enough that what a copy costs to start does not count


class Upload:
    """Copies tensors of the host to one device."""

    def __init__(self, device: torch.device, buffer_bytes: int | None = None) -> None:
        """Makes the buffers: of `buffer_bytes` each, or of a size for `device`, 0 on the CPU.

        Without buffers copies go straight to their target.
        """
        if buffer_bytes is None:
            buffer_bytes = 0 if device.type == "cpu" else BUFFER_BYTES
        self._device = device
        pinned = device.type == "cuda"
        self._buffers = [_Buffer(buffer_bytes, pinned=pinned) for _ in range(2) if buffer_bytes]
        self._next = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Fills `target`, a tensor or a part of one on the device, with `source` of the host.

        Args:
            source: of any dtype and strides; may be a part of a mapped file.
            target: of the same shape and any dtype. Work that is given to the device afterwards
                finds it filled.
        """
        if not self._buffers:
            target.copy_(source)
            return
        rows = max(1, self._buffers[0].size * len(source) // (source.numel() * source.itemsize))
        for piece, place in zip(torch.split(source, rows), torch.split(target, rows), strict=True):
            buffer = self._buffers[self._next]
            self._next = 1 - self._next
            buffer.send(piece, place)

    def moved(self, source: torch.Tensor) -> torch.Tensor:
        """`source` on the device: itself, where that is the host."""
        if not self._buffers:
            return source
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self.copy(source, target)
        return target


class _Buffer:
    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._fetched = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def send(self, piece: torch.Tensor, place: torch.Tensor) -> None:
        """Copies `piece` into the buffer, and has the device fetch it into `place`."""
        if self._fetched is not None:
            self._fetched.synchronize()  # returns at once when the buffer was never fetched
        size = piece.numel() * piece.itemsize
        if size > self.size:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._bytes.is_pinned())
            self.size = size
        staged = self._bytes[:size].view(piece.dtype).view(piece.shape)
        staged.copy_(piece)
        # Not blocking, so that another dtype is converted to on the device.
        place.copy_(staged, non_blocking=True)
        if self._fetched is not None:
            self._fetched.record()
