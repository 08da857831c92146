"""Where the device's time goes in a decode step: which kernels, how long, and the gaps between.

From PyTorch's profiler, which sees each kernel of a CUDA graph as well. It slows the host down a
little, so a trace's gaps are no shorter than those of a run without it; each is given beside the
time of a step that was not traced.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # as its profiler does
from torch.profiler import ProfilerActivity, profile

from bench.engine.driver import Driver
from bench.gpu.sizes import Sizes
from bench.report import Row, Value

MOST_ROWS = 16
LONGEST_NAME = 90  # characters


class Span(NamedTuple):
    """A kernel or a copy on the device, in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What the device did in some steps; spans in the order of their beginnings."""

    spans: Sequence[Span]
    steps: int

    @property
    def seconds(self) -> float:
        """From the first beginning to the last end."""
        return (max(span.end for span in self.spans) - self.spans[0].begin) / 1e6

    def gaps(self) -> list[Span]:
        """Where the device did nothing, each named after what came before and behind it."""
        gaps = []
        last = self.spans[0]
        for span in self.spans[1:]:
            if span.begin > last.end:
                gaps.append(Span(f"{short(last.name)} → {short(span.name)}", last.end, span.begin))
            if span.end > last.end:
                last = span
        return gaps

    def idle_share(self) -> float:
        """Of the time, in which the device did nothing."""
        return sum(gap.end - gap.begin for gap in self.gaps()) / 1e6 / self.seconds

    def between_steps_share(self) -> float:
        """Of the time, that lies in the longest gaps, as many as there are ends between steps.

        No less than what really lies between the steps, and no more than all gaps.
        """
        lengths = sorted((gap.end - gap.begin for gap in self.gaps()), reverse=True)
        return sum(lengths[: self.steps - 1]) / 1e6 / self.seconds


def short(name: str) -> str:
    """A kernel's name without what makes it unreadable in a table."""
    plain = name.removeprefix("void ").replace("|", "/").replace("`", "'")
    return plain if len(plain) <= LONGEST_NAME else plain[: LONGEST_NAME - 1] + "…"


def record(step: Callable[[], object], steps: int, device: torch.device) -> Trace:
    """Traces so many calls of `step`.

    RuntimeError: the profiler saw nothing.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities):  # the first one of a process takes long to start
        step()
        _wait_for(device)
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        _wait_for(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == kind and not event.is_user_annotation
    ]
    if not spans:
        raise RuntimeError("the profiler saw no work on the device")
    return Trace(sorted(spans, key=lambda span: span.begin), steps)


def profile_steps(driver: Driver, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Decode steps of one stream and of a batch."""
    steps = sizes.traced_steps
    for streams in (1, sizes.streams):
        prompts = driver.prompts([sizes.prompt] * streams)
        driver.fill(prompts, [sizes.answer + 4 * steps] * streams)
        driver.step()  # the first without prompts
        started = time.perf_counter()
        for _ in range(steps):
            driver.step()
        taken = time.perf_counter() - started
        yield from trace_rows(record(driver.step, steps, device), streams, taken / steps)
        driver.clear()


def trace_rows(trace: Trace, streams: int, step_seconds: float) -> Iterator[Row]:
    """The trace as tables; `step_seconds` is a step's time without the profiler."""
    settings: dict[str, Value] = {"streams": streams}
    yield Row(
        "device idle",
        settings,
        {
            "step_ms": 1e3 * step_seconds,
            "traced_step_ms": 1e3 * trace.seconds / trace.steps,
            "kernels_per_step": len(trace.spans) / trace.steps,
            "idle_percent": 100 * trace.idle_share(),
            "between_steps_percent": 100 * trace.between_steps_share(),
        },
    )
    yield from _by_name("kernels", trace.spans, trace, settings)
    yield from _by_name("gaps", trace.gaps(), trace, settings)


def _by_name(
    case: str, spans: Sequence[Span], trace: Trace, settings: dict[str, Value]
) -> Iterator[Row]:
    """A row for each name, those of the longest time first; the rest in one."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        found[short(span.name)].append(span.end - span.begin)
    order = sorted(found.items(), key=lambda item: sum(item[1]), reverse=True)
    rest = [length for _, lengths in order[MOST_ROWS:] for length in lengths]
    shown = [(f"`{name}`", lengths) for name, lengths in order[:MOST_ROWS]]
    for name, lengths in shown + ([("all others", rest)] if rest else []):
        yield Row(
            case,
            {**settings, "name": name},
            {
                "per_step": len(lengths) / trace.steps,
                "us_per_step": sum(lengths) / trace.steps,
                "percent_of_step": 100 * sum(lengths) / 1e6 / trace.seconds,
            },
        )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
