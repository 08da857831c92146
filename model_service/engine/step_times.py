"""How long steps take, and how many sequences they serve: observed in every step, so in the cheap
histograms, and told in the load report.
"""

from typing import NamedTuple

from serving.histogram import Histogram, Snapshot

SECONDS = (
    *(0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003),
    *(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class StepReport(NamedTuple):  # one per step: a frozen dataclass is slower to create
    """All steps since the start."""

    schedule: Snapshot  # seconds, choosing tokens and putting the batch together
    forward: Snapshot  # seconds, until the logits are there or, on CUDA, on their way
    sample: Snapshot  # seconds, from logits to outputs; on CUDA with the rest of the forward
    rows: Snapshot  # sequences in a step


class StepTimes:
    """What the engine notes about its steps."""

    def __init__(self) -> None:
        self._schedule = Histogram(SECONDS)
        self._forward = Histogram(SECONDS)
        self._sample = Histogram(SECONDS)
        self._rows = Histogram(ROWS)

    def note(
        self, rows: int, started: float, planned: float, computed: float, ended: float
    ) -> None:
        """Takes a step of `rows` sequences, by the time.monotonic between its parts."""
        self._schedule.observe(planned - started)
        self._forward.observe(computed - planned)
        self._sample.observe(ended - computed)
        self._rows.observe(rows)

    def report(self) -> StepReport:
        return StepReport(
            self._schedule.snapshot(),
            self._forward.snapshot(),
            self._sample.snapshot(),
            self._rows.snapshot(),
        )
