"""How long steps take, and how many sequences they serve. Noted in every step, so in the cheap
histograms; whoever wants to know reads them from another thread, at no cost for the engine.
"""

from serving.telemetry.histogram import Histogram

SECONDS = (
    *(0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003),
    *(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class StepTimes:
    """All steps since the start. Only the engine writes."""

    def __init__(self) -> None:
        # In seconds. With lookahead, forward is the time from one step's tokens to the next one's,
        # and the other two pass on the host meanwhile. Without, on CUDA the forward ends with its
        # logits on their way; what is left of it then is counted with what comes after.
        self.parts = {name: Histogram(SECONDS) for name in ("schedule", "forward", "sample")}
        self.rows = Histogram(ROWS)  # sequences in a step
        self._schedule, self._forward, self._sample = self.parts.values()

    def note(self, rows: int, *, schedule: float, forward: float, sample: float) -> None:
        """Takes a step of `rows` sequences."""
        self._schedule.observe(schedule)
        self._forward.observe(forward)
        self._sample.observe(sample)
        self.rows.observe(rows)
