"""Draws on the host: one vectorised pass over rows of logits, each with its own parameters.

The draw is an inverse CDF over the kept tokens in the order of their ids, not of their
probabilities: then a rounding difference in the logits can only move a border by as much, and never
swap two tokens of nearly equal probability.
"""

from collections.abc import Mapping

import numpy as np
import torch

from model_service.engine.sampling.columns import (
    MIN_TEMPERATURE,
    draw_columns,
    temperature_column,
)
from model_service.engine.sampling.host.penalties import SamplingRow, apply_penalties
from model_service.engine.sampling.host.truncation import choose
from model_service.model.cpu.draws import Draw, draw
from model_service.model.cpu.layers import Scan

_LARGEST = torch.finfo(torch.float32).max


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """The next token of each row.

    Args:
        logits: [rows, vocab] float32, finite.
        rows: one per row of logits.
    """
    logits = apply_penalties(logits, rows)
    random = [index for index, row in enumerate(rows) if not row.params.greedy]
    if not random:
        return _argmax(logits)
    if len(random) == len(rows):
        return _draw(logits, rows)
    tokens = dict(zip(random, _draw(logits[random], [rows[i] for i in random]), strict=True))
    greedy = [index for index in range(len(rows)) if index not in tokens]
    tokens |= zip(greedy, _argmax(logits[greedy]), strict=True)
    return [tokens[index] for index in range(len(rows))]


def sample_rows(
    logits: torch.Tensor, scan: Scan | None, rows: Mapping[int, SamplingRow]
) -> dict[int, int]:
    """The next token of some rows of `logits`, by the library where it made them.

    Args:
        logits: [all rows, vocab] float32.
        scan: of them, if there is one.
        rows: by their index in the logits, in ascending order, all of them finite.
    """
    tokens = {} if scan is None else _sample_scanned(scan, rows)
    if left := [i for i in rows if i not in tokens]:
        chosen = logits if len(left) == len(logits) else logits[left]
        tokens |= zip(left, sample(chosen, [rows[i] for i in left]), strict=True)
    return tokens


def _sample_scanned(scan: Scan, rows: Mapping[int, SamplingRow]) -> dict[int, int]:
    """Tokens of those rows whose logits are taken as they are, by the compiled library.

    Whether it draws for a row depends on that row alone: its last bits differ from `sample`'s.
    """
    plain = {i: row for i, row in rows.items() if not row.changes_logits}
    tokens = {i: scan.largest[i] for i, row in plain.items() if row.params.greedy}
    draws = [_draw_of(scan, i, row) for i, row in plain.items() if not row.params.greedy]
    if draws:
        tokens |= zip((each.row for each in draws), draw(scan, draws), strict=True)
    return tokens


def _draw_of(scan: Scan, index: int, row: SamplingRow) -> Draw:
    params = row.params
    top_k = min(params.top_k or scan.vocab, scan.vocab)
    temperature = max(params.temperature, MIN_TEMPERATURE)
    limits = temperature, params.min_p, params.top_p
    return Draw(index, top_k, *limits, params.seed, len(row.tokens))


def finite_rows(logits: torch.Tensor, scan: Scan | None = None) -> list[bool]:
    """For each row of [rows, vocab] whether all of its logits are finite."""
    if scan is not None:
        return scan.finite
    # On a CPU a sum is 20 times cheaper than looking at each logit, and no NaN or infinity gets
    # lost in it; where large numbers made it overflow, the second look tells.
    finite = np.isfinite(logits.sum(dim=-1).cpu().numpy())
    if not finite.all():
        suspects = logits[torch.from_numpy(~finite).to(logits.device)]
        finite[~finite] = torch.isfinite(suspects).all(dim=-1).cpu().numpy()
    return list(map(bool, finite))


def _argmax(logits: torch.Tensor) -> list[int]:
    """The lowest id among the largest logits of each row."""
    if logits.device.type == "cpu":  # where numpy's is 8 times faster
        return [int(token) for token in logits.numpy().argmax(axis=-1)]
    return [int(token) for token in logits.argmax(dim=-1).tolist()]


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    params = [row.params for row in rows]
    columns = draw_columns(params, [len(row.tokens) for row in rows], logits.shape[-1])
    temperature = temperature_column(params)
    scaled = logits / torch.from_numpy(temperature).to(logits.device)
    if temperature.min() < 1e-6:
        scaled.clamp_(-_LARGEST, _LARGEST)
    # In place: touching fresh megabytes takes longer than the exponentials.
    probabilities = torch.softmax(scaled, dim=-1, out=scaled)
    return [int(token) for token in choose(probabilities, columns)]
