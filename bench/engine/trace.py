"""The device's time in decode steps: which kernels, how long, and the gaps between them.

PyTorch's profiler sees each kernel of a CUDA graph, too. It slows the host down, so the gaps are no
shorter than without it; each trace is given beside the time of a step that was not traced.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # as its profiler does
from torch.profiler import ProfilerActivity, profile, record_function

from bench.engine.driver import Load
from bench.engine.throughput import Loaded
from bench.report import Row, Value

MAX_ROWS = 16
MAX_NAME = 90  # characters


class Span(NamedTuple):
    """A kernel or a copy on the device, in microseconds."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """The work of the device in some steps; spans in the order of their beginnings."""

    spans: Sequence[Span]
    steps: int

    @property
    def seconds(self) -> float:
        """From the first beginning to the last end."""
        return (max(span.end for span in self.spans) - self.spans[0].begin) / 1e6

    def gaps(self) -> list[Span]:
        """Where the device did nothing, each named after the kernels before and behind it."""
        gaps = []
        last = self.spans[0]
        for span in self.spans[1:]:
            if span.begin > last.end:
                gaps.append(Span(f"{short(last.name)} → {short(span.name)}", last.end, span.begin))
            if span.end > last.end:
                last = span
        return gaps

    def idle_share(self, gaps: int | None = None) -> float:
        """Share of the time in which the device did nothing, in all gaps or in the longest ones.

        As many gaps as there are ends between steps hold no less than what really lies between the
        steps.
        """
        lengths = sorted((gap.end - gap.begin for gap in self.gaps()), reverse=True)
        return sum(lengths[:gaps]) / 1e6 / self.seconds


def short(name: str) -> str:
    """A kernel's name without what makes it unreadable in a table."""
    plain = name.removeprefix("void ").replace("|", "/").replace("`", "'")
    return plain if len(plain) <= MAX_NAME else plain[: MAX_NAME - 1] + "…"


def record(step: Callable[[], object], steps: int, device: torch.device) -> Trace:
    """Traces `steps` calls of `step`. Raises RuntimeError when the profiler saw nothing."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    for calls in (1, steps):  # the first profile of a process is slow to start
        with profile(activities=activities) as found:
            for _ in range(calls):
                # On the CPU, the compiled library computes a step without PyTorch's operations.
                with nullcontext() if cuda else record_function("step"):
                    step()
            if cuda:
                torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == kind and not (cuda and event.is_user_annotation)
    ]
    if not spans:
        raise RuntimeError("the profiler saw no work on the device")
    return Trace(sorted(spans, key=lambda span: span.begin), steps)


def profile_steps(loaded: Loaded, load: Load, steps: int) -> Iterator[Row]:
    """Decode steps of `load`."""
    driver = loaded.driver
    answers = [load.answer] * load.streams
    driver.fill(driver.prompts([load.prompt] * load.streams), answers)
    driver.step()  # the first without prompts
    started = time.perf_counter()
    for _ in range(steps):
        driver.step()
    taken = time.perf_counter() - started
    trace = record(driver.step, steps, loaded.job.device)
    driver.clear()
    yield from trace_rows(trace, load.streams, taken / steps)


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
            "between_steps_percent": 100 * trace.idle_share(trace.steps - 1),
        },
    )
    for case, spans in (("kernels", trace.spans), ("gaps", trace.gaps())):
        for name, lengths in _by_name(spans):
            yield Row(
                case,
                {**settings, "name": name},
                {
                    "per_step": len(lengths) / trace.steps,
                    "us_per_step": sum(lengths) / trace.steps,
                    "percent_of_step": 100 * sum(lengths) / 1e6 / trace.seconds,
                },
            )


def _by_name(spans: Sequence[Span]) -> Iterator[tuple[str, list[float]]]:
    """Lengths by name, those of the longest time first; the rest in one."""
    found: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        found[short(span.name)].append(span.end - span.begin)
    order = sorted(found.items(), key=lambda item: sum(item[1]), reverse=True)
    yield from ((f"`{name}`", lengths) for name, lengths in order[:MAX_ROWS])
    if rest := [length for _, lengths in order[MAX_ROWS:] for length in lengths]:
        yield "all others", rest
