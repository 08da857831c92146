"""Draws a run as one picture: the distributions of latencies, and the throughput over time.

This is the only module that needs the extra `bench`. It does not use pyplot, which keeps global
state and looks for a display.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from chasqui.loadtest.measurement import Measurement
from chasqui.loadtest.records import Run
from chasqui.loadtest.summary import Distribution, tokens_per_second

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".pdf", ".svg")
BINS = 60
BLUE, ORANGE, GREY = "#1f5f9e", "#c8561b", "#767676"
# The ratio of greatest to least sample from which on an axis is logarithmic.
WIDE = 30.0


def available() -> bool:
    """Whether the extra `bench` is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(measurement: Measurement, path: Path) -> None:
    """Draws a measurement into a file, in the format of its suffix, one of FORMATS."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    run, summary = measurement.run, measurement.summary
    records = [record for record, _ in run.successes]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (first, gaps), (whole, rate) = figure.subplots(2, 2)
    _cdf(
        first,
        "Time to first token",
        "requests",
        (record.time_to_first_token for record in records),
        summary.time_to_first_token,
    )
    _cdf(
        gaps,
        "Inter-token latency",
        "gaps",
        (gap for record in records for gap in record.gaps),
        summary.inter_token_latency,
    )
    _cdf(
        whole,
        "End-to-end latency",
        "requests",
        (record.end_to_end for record in records),
        summary.end_to_end_latency,
    )
    _throughput(rate, run, summary.output_tokens_per_second)
    figure.suptitle(_title(measurement))
    figure.savefig(path, dpi=150)


def _cdf(
    axes: "Axes",
    title: str,
    unit: str,
    samples: Iterable[float | None],
    distribution: Distribution | None,
) -> None:
    axes.set(title=title, xlabel="ms", ylabel=f"share of {unit}", ylim=(0, 1.02))
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    if distribution is None:
        axes.text(0.5, 0.5, "no samples", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.ecdf([1e3 * sample for sample in samples if sample is not None], color=BLUE)
    if distribution.min > 0 and distribution.max / distribution.min > WIDE:
        axes.set(xscale="log", xlabel="ms, logarithmic")
        axes.xaxis.set_major_formatter("{x:g}")
    for percent, style in ((50, "--"), (99, ":")):
        value = 1e3 * distribution.percentile(percent)
        label = f"p{percent} = {value:,.1f} ms"
        axes.axvline(value, color=ORANGE, linestyle=style, linewidth=1.2, label=label)
    axes.legend(loc="lower right")


def _throughput(axes: "Axes", run: Run, mean: float) -> None:
    axes.set(title="Throughput", xlabel="s since the start", ylabel="output tokens/s")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    if not run.successes:
        axes.text(0.5, 0.5, "no samples", transform=axes.transAxes, ha="center", color=GREY)
        return
    edges = [run.seconds * index / BINS for index in range(BINS + 1)]
    rates = tokens_per_second(run, BINS)
    axes.stairs(rates, edges, fill=True, color=BLUE, alpha=0.35)
    axes.axhline(mean, color=ORANGE, linestyle="--", linewidth=1.2, label=f"mean = {mean:,.1f}")
    axes.set(xlim=(0, run.seconds), ylim=(0, 1.2 * max(rates)))  # room for the legend
    axes.legend(loc="upper right")


def _title(measurement: Measurement) -> str:
    summary = measurement.summary
    failed = f", {summary.failed:,} failed" if summary.failed else ""
    return (
        f"{measurement.model.name}: {summary.succeeded:,} requests, {measurement.plan.loop}{failed}"
    )
