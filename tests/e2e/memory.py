"""The resident memory of the processes of a deployment, sampled each second, and how it grows."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import linear_regression

import psutil

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Resident:
    """Samples of one process, in order."""

    seconds: list[float] = field(default_factory=list)  # since the first
    bytes: list[int] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """KiB a second, by least squares."""
        return linear_regression(self.seconds, self.bytes).slope / KIB

    @property
    def growth(self) -> float:
        """KiB, from the first sample to the last, along the fitted line."""
        return self.slope * (self.seconds[-1] - self.seconds[0])

    def after(self, seconds: float) -> "Resident":
        first = sum(each < seconds for each in self.seconds)
        return Resident(self.seconds[first:], self.bytes[first:])

    def __str__(self) -> str:
        minutes = " ".join(f"{each / MIB:.1f}" for each in self.bytes[::60])
        return f"{self.slope:+.2f} KiB/s; {self.growth:+.0f} KiB; MiB each minute: {minutes}"


async def watch_memory(processes: Mapping[str, psutil.Process]) -> dict[str, Resident]:
    """Samples until it is cancelled; then returns what it has."""
    samples = {name: Resident() for name in processes}
    begin = time.monotonic()
    try:
        while True:
            for name, process in processes.items():
                samples[name].seconds.append(time.monotonic() - begin)
                samples[name].bytes.append(process.memory_info().rss)
            await asyncio.sleep(1)
    except asyncio.CancelledError:
        return samples


def with_shards(name: str, process: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """A process and, if it has started several, its ranks."""
    yield name, process
    for child in process.children(recursive=True):
        if (rank := child.environ().get("RANK")) is not None:
            yield f"{name} rank {rank}", child
