"""Host memory from which a step's index vectors are copied to the device, reused step after step.

The copies are only enqueued, and the device may reach them a step later, so the memory must not be
written again before they are done. That includes what FlashInfer's plans write to page-locked
memory of their own: whoever plans calls `take` before, and `sent` after.
"""

import numpy as np
import torch
from numpy.typing import NDArray


class Staging:
    """One page-locked vector of 32-bit integers, and when it is free again."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._copied: torch.cuda.Event | None = None
        self._vector = torch.empty(0, dtype=torch.int32)

    def take(self, *parts: NDArray[np.int32]) -> list[torch.Tensor]:
        """Waits until all that was sent has arrived, then holds `parts`; one view for each."""
        if self._copied is not None:
            self._copied.synchronize()
        size = sum(len(part) for part in parts)
        if size > len(self._vector):
            # Twice what is needed: a cache that fills step by step would ask again each time.
            self._vector = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._on_cuda)
        views = list(torch.split(self._vector[:size], [len(part) for part in parts]))
        np.concatenate(parts, out=self._vector[:size].numpy())
        return views

    def sent(self) -> None:
        """Notes that every copy of what `take` gave has been enqueued."""
        if self._on_cuda:
            if self._copied is None:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
