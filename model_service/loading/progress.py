"""Reports how far the weights are loaded: a bar on a terminal, else some log lines.

`chasqui serve` makes a bar of the lines, which it recognises by `LOADING`.
"""

import logging
import sys
import time
from collections.abc import Iterator

import torch

from serving.telemetry.progress import DELAY, progress

LOADING = "loading weights: %d %%"
_STEP = 5  # percent from one line to the next
_log = logging.getLogger(__name__)

Weights = Iterator[tuple[str, torch.Tensor]]


def reported(weights: Weights, total: int) -> Weights:
    """The same weights; their share of `total` numbers is reported if loading takes long."""
    if sys.stderr is not None and sys.stderr.isatty():
        return _with_bar(weights, total)
    return _with_lines(weights, total)


def _with_bar(weights: Weights, total: int) -> Weights:
    # Bytes are shown, of a number at the size of the type that the weights are loaded in.
    first = next(weights, None)
    if first is None:
        return
    with progress("loading weights", total * first[1].itemsize) as advance:
        yield first
        advance(first[1].nbytes)
        for name, weight in weights:
            yield name, weight
            advance(weight.nbytes)


def _with_lines(weights: Weights, total: int) -> Weights:
    """A line for every `_STEP` percent, at most one a second, from the first second on."""
    loaded = 0
    next_percent, next_time = _STEP, time.monotonic() + DELAY
    for name, weight in weights:
        yield name, weight
        loaded += weight.numel()
        percent = 100 * loaded // total
        if percent >= next_percent and time.monotonic() >= next_time:
            _log.info(LOADING, percent)
            next_percent = percent - percent % _STEP + _STEP
            next_time = time.monotonic() + DELAY
    if _STEP < next_percent <= 100:  # so that the last line says that all are there
        _log.info(LOADING, 100)
