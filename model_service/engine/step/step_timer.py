"""The seconds that one step takes: by the device's clock on CUDA, else by the host's.

A step that is launched ahead is read after the next one's launch, which may take longer than the
step itself. So the host's clock would add that launch to the wrong step.
"""

import time

import torch


class StepTimer:
    """Two moments on the device's stream, around a step's work."""

    def __init__(self, device: torch.device) -> None:
        """Begins: now on the host, and on the device when all that was enqueued so far is done."""
        self.started = time.monotonic()
        self.launch_seconds = 0.0  # of the host, up to `end`
        self._events: tuple[torch.cuda.Event, ...] = ()
        if device.type == "cuda":
            self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types
            self._events[0].record()

    def end(self) -> None:
        """Marks the end of the step's work, which has been enqueued."""
        self.launch_seconds = time.monotonic() - self.started
        if self._events:
            self._events[1].record()

    def seconds(self, read_before: float, read: float) -> float:
        """The step's seconds, when its result is there.

        Args:
            read_before: when the last step's result was there, by time.monotonic.
            read: when this one's was.
        """
        if not self._events:
            return read - max(self.started, read_before)
        begin, end = self._events
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
