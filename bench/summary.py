"""Medians, spreads, and ratios of medians: the only statistics that results state.

A median shrugs off the rounds that something else on the machine disturbed; the spread shows that
there were some.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Raises ValueError when there is nothing to summarize."""
    if not values:
        raise ValueError("no measurements")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median of `values` over median of `reference`; both must be from one interleaved run."""
    return summarize(values).median / summarize(reference).median
