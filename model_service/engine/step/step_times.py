"""How long the parts of steps take, and how many sequences steps serve, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

SECONDS = (
    *(0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003),
    *(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class StepTimes:
    """All steps since the start. The engine observes; a scrape collects in a thread of its own."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "chasqui_model_step_seconds",
            "Time of a step's parts. On CUDA, sample includes what is left of the forward; with "
            "lookahead, forward is the time between two steps' tokens, which includes the others.",
            ["part"],
            buckets=SECONDS,
            registry=None,
        )
        self._sequences = Histogram(
            "chasqui_model_step_sequences",
            "Sequences that a step serves.",
            buckets=SEQUENCES,
            registry=None,
        )
        self._draft, self._schedule, self._forward, self._sample = (
            self._seconds.labels(part) for part in ("draft", "schedule", "forward", "sample")
        )

    def observe(
        self, sequences: int, *, draft: float, schedule: float, forward: float, sample: float
    ) -> None:
        """Records a step of some sequences; `draft` is 0 if no draft model computed anything."""
        if draft:
            self._draft.observe(draft)
        self._schedule.observe(schedule)
        self._forward.observe(forward)
        self._sample.observe(sample)
        self._sequences.observe(sequences)

    def collect(self) -> Iterator[Metric]:
        yield from self._seconds.collect()
        yield from self._sequences.collect()
