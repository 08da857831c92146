"""Plots of the result files; needs the extra `bench` (matplotlib).

Drawn from a report alone. Bars and points are medians, whiskers the lowest and highest
measurement; one colour belongs to one precision or engine in all plots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import Report, Row, Value

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
GREY = "#999999"
STYLE: dict[Any, Any] = {  # matplotlib types its keys one by one
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "savefig.dpi": 150,
}


def plot_engine(report: Report, folder: Path) -> list[Path]:
    """A PNG per case that has more than a number to show. Returns the files."""
    drawn = {
        "decode": _decode,
        "context": _context,
        "dialog": _dialog,
        "stall": _stall,
        "shards": _shards,
    }
    return _draw(report, drawn, folder)


def plot_baselines(report: Report, folder: Path) -> list[Path]:
    """A PNG of bars per case. Returns the files."""
    cases = dict.fromkeys(row.case for row in report.rows if "tokens_per_s" in row.values)
    return _draw(report, dict.fromkeys(cases, _contenders), folder)


def plot_gpu(report: Report, folder: Path) -> list[Path]:
    """A PNG of a GPU's run beside its targets, and one of latencies under load."""
    return _draw(report, {"targets": _targets, "day": _day}, folder)


def _draw(
    report: Report, drawn: Mapping[str, Callable[[Axes, list[Row]], None]], folder: Path
) -> list[Path]:
    files = []
    for case, draw in drawn.items():
        rows = [row for row in report.rows if row.case == case]
        if not rows:
            continue
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(6.4, 3.8), layout="constrained")
            axes = figure.add_subplot()
            draw(axes, rows)
            machine = report.details.get("device", report.host.processor)
            axes.set_title(f"{case}, {report.details['shape']}, {machine}", loc="left")
            files.append(folder / f"{case}.png")
            figure.savefig(files[-1])
    return files


def _decode(axes: Axes, rows: list[Row]) -> None:
    axes.set_xscale("log", base=2)
    _lines(axes, rows, "streams", "tokens_per_s", series="precision")
    _label(axes, "streams", "tokens per second, all streams")


def _context(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, "context", "step_ms", series="precision")
    _label(axes, "tokens in the context of each stream", "step, ms")


def _dialog(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, "turn", "first_token_ms", series="precision", style="prefix_cache")
    _label(axes, "turn of the dialog", "time to first token, ms")


def _shards(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, "shards", "step_ms", series="precision")
    _label(axes, "shards, on the same cores", "step, ms")


def _stall(axes: Axes, rows: list[Row]) -> None:
    names = [f"{row.settings['precision']}\n{row.settings['chunks']}" for row in rows]
    heights = [_number(row.values["longest_gap_over_step"]) for row in rows]
    bars = axes.bar(names, heights, color=COLORS[0], width=0.6)
    axes.bar_label(bars, fmt="%.1f")
    axes.axhline(1, color=GREY, linestyle="--")
    _label(axes, "", "longest gap ÷ step without the prompt")


def _targets(axes: Axes, rows: list[Row]) -> None:
    """Each measurement over its bound: which side is right, the sign in the label says."""
    rows = rows[::-1]
    bounds = [float(str(row.values["target"]).split()[1]) for row in rows]
    measured = [_number(row.values["measured"]) for row in rows]
    colors = [COLORS[2] if row.values["met"] == "yes" else COLORS[1] for row in rows]
    names = [f"{row.settings['what']} {row.values['target']}" for row in rows]
    ratios = [value / bound for value, bound in zip(measured, bounds, strict=True)]
    bars = axes.barh(names, ratios, color=colors)
    axes.bar_label(bars, [f" {value:.3g}" for value in measured])
    axes.axvline(1, color=GREY, linestyle="--")
    axes.margins(x=0.15)
    _label(axes, "measured ÷ bound", "")


def _day(axes: Axes, rows: list[Row]) -> None:
    loads = [row for row in rows if row.settings["requests_per_s"] is not None]
    names = [str(row.settings["load"]) for row in loads]
    for color, percent in zip(COLORS, (50, 95, 99), strict=False):
        for dashes, latency in (("-", "first_token"), ("--", "between_tokens")):
            values = [_number(row.values[f"{latency}_ms_p{percent}"]) for row in loads]
            label = f"{latency.replace('_', ' ')}, p{percent}"
            axes.plot(names, values, dashes, marker="o", markersize=4, color=color, label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    _label(axes, "load, of the capacity", "ms")


def _contenders(axes: Axes, rows: list[Row]) -> None:
    ordered = sorted(rows, key=lambda row: _number(row.values["tokens_per_s"]))
    names = [str(row.settings["contender"]) for row in ordered]
    values = [_number(row.values["tokens_per_s"]) for row in ordered]
    low = [v - _number(r.values["tokens_per_s_low"]) for v, r in zip(values, ordered, strict=True)]
    high = [
        _number(r.values["tokens_per_s_high"]) - v for v, r in zip(values, ordered, strict=True)
    ]
    colors = [COLORS[0] if name.startswith("chasqui") else GREY for name in names]
    bars = axes.barh(names, values, xerr=[low, high], color=colors, capsize=2)
    axes.bar_label(bars, fmt=" %.0f", label_type="center", color="white")
    _label(axes, "tokens per second (median; whiskers: lowest and highest)", "")


def _lines(
    axes: Axes, rows: list[Row], x: str, y: str, *, series: str, style: str | None = None
) -> None:
    """A line per value of `series` (its colour) and of `style` (its dashes)."""
    names = _distinct(rows, series)
    styles = _distinct(rows, style) if style else [None]
    for color, name in zip(COLORS, names, strict=False):
        for dashes, variant in zip(("-", "--", ":"), styles, strict=False):
            points = [
                row
                for row in rows
                if row.settings[series] == name and (not style or row.settings[style] == variant)
            ]
            label = f"{name}" if not style else f"{name}, {style.replace('_', ' ')} {variant}"
            xs = [_number(row.settings[x]) for row in points]
            ys = [_number(row.values[y]) for row in points]
            axes.plot(xs, ys, dashes, marker="o", markersize=4, color=color, label=label)
            _band(axes, points, xs, y, color)
    axes.legend(frameon=False)
    ticks = sorted({_number(row.settings[x]) for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _band(axes: Axes, points: Sequence[Row], xs: Sequence[float], y: str, color: str) -> None:
    """Shades from the lowest to the highest measurement where rows carry both."""
    if points and f"{y}_low" in points[0].values:
        low = [_number(row.values[f"{y}_low"]) for row in points]
        high = [_number(row.values[f"{y}_high"]) for row in points]
        axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _distinct(rows: Iterable[Row], setting: str) -> list[Value]:
    return list(dict.fromkeys(row.settings[setting] for row in rows))


def _number(value: Value) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} cannot be drawn")
    return float(value)
