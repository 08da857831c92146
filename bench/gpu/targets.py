"""What the engine is to reach with Llama 2's shapes on one card, and whether a run reached it.

The bounds are shares of what was measured on the card in the same run, or ratios of two
measurements of it, so they mean the same on any card.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bench.report import Row, Value


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one value of the row of `case` that has these settings."""

    name: str
    case: str
    settings: Mapping[str, Value]
    value: str
    bound: float
    at_most: bool = False  # instead of at least

    def met_by(self, measured: float) -> bool:
        return measured <= self.bound if self.at_most else measured >= self.bound

    def concerns(self, row: Row) -> bool:
        if row.case != self.case or self.value not in row.values:
            return False
        return all(row.settings.get(name) == value for name, value in self.settings.items())


TARGET_SHAPE = "7B"  # of the run; the cases of larger shapes are a part of it
_7B = {"shape": "7B", "weights": "bfloat16"}
_70B = {"shape": "70B", "weights": "int8"}


def _format(name: str) -> dict[str, Value]:
    return {"shape": "7B", "format": name}


def _chat(streams: int) -> dict[str, Value]:
    return {"call": "chat", "streams": streams}


TARGETS = (
    Target("one stream, of the copy bandwidth", "one stream", _7B, "share_of_copy_bandwidth", 0.85),
    Target("batch of 64, of its limit", "batch", _7B, "share_of_limit", 0.65),
    Target("prompt of 2,048, of the matrix rate", "prefill", _7B, "share_of_matrix_rate", 0.65),
    Target("first token behind 512, over its limit", "first token", _7B, "over_limit", 1.3, True),
    Target(
        "one stream, between steps, % of a step",
        "device idle",
        {"streams": 1},
        "between_steps_percent",
        3.0,
        True,
    ),
    Target("service, one stream, over the engine", "service", _chat(1), "ratio", 0.95),
    Target("service, 64 streams, over the engine", "service", _chat(64), "ratio", 0.90),
    Target("int8, one stream, over bfloat16", "formats", _format("int8"), "over_wide", 1.7),
    Target("int4, one stream, over bfloat16", "formats", _format("int4"), "over_wide", 2.6),
    Target("fp8, one stream, over bfloat16", "formats", _format("fp8"), "over_wide", 1.7),
    Target("fp8, prefill, over bfloat16", "formats", _format("fp8"), "prefill_over_wide", 1.4),
    Target("70B, of the copy bandwidth", "one stream", _70B, "share_of_copy_bandwidth", 0.75),
    Target(
        "256 sequences, slowest step over its limit",
        "crowd",
        {"arrivals_per_step": 0},
        "over_limit_high",
        1.2,
        True,
    ),
)


def against_targets(rows: Iterable[Row]) -> Iterator[Row]:
    """A row for each target that was measured."""
    rows = tuple(rows)
    for target in TARGETS:
        for row in filter(target.concerns, rows):
            measured = float(str(row.values[target.value]))
            yield Row(
                "targets",
                {"what": target.name},
                {
                    "measured": measured,
                    "target": f"{'≤' if target.at_most else '≥'} {target.bound:g}",
                    "met": "yes" if target.met_by(measured) else "no",
                },
            )
