"""Top-k, min-p and top-p, and the draw among the tokens that they leave.

A full sort of 32,000 probabilities takes longer than all other sampling. So the device finds a few
hundred candidates, and the host applies the rules to those. Rows whose kept tokens may not all be
among them get more candidates, in the end all tokens. Every choice is the one that sorting all
tokens gives, to the last bit: sums run in float64 in one order, from the most probable token or
from the lowest id, and tokens outside of the candidates come later or add 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_service.engine.sampling.columns import DrawColumns

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]
Columns = DrawColumns[NDArray[Any]]

# A block is this many tokens, a fixed stride apart; the blocks with the largest maxima are looked
# into. Most rows of a chat keep fewer than 60 tokens, almost all fewer than 500.
BLOCK = 16
BLOCKS = 64, 512
# Arrays of more than a megabyte cost more in page faults than in arithmetic.
_ELEMENTS_AT_ONCE = 1 << 17
# Rounded to float32, the mass before a token is off by less than this, and so may even fall from
# one token to the next.
_ROUNDING = 2.0**-22
_LOW = np.int64(0xFFFFFFFF)
_HALF = np.int64(32)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Most probable tokens of each row, descending; among equals the lowest id comes first."""

    probabilities: Floats  # [rows, n]
    ids: Ids  # [rows, n]
    bound: Floats  # [rows, 1]; more probable tokens are all here, −1 where all tokens are


def choose(probabilities: torch.Tensor, columns: Columns) -> Ids:
    """One token per row [rows], drawn among those that the row's rules keep.

    Args:
        probabilities: [rows, vocab] float32.
        columns: the rows' parameters.
    """
    vocab = probabilities.shape[-1]
    tokens = np.empty(len(probabilities), dtype=np.int64)
    whole = (columns.top_k >= vocab) & (columns.min_p <= 0) & (columns.top_p >= 1)
    everything, undecided = np.flatnonzero(whole), np.flatnonzero(~whole)
    for rows in _slices(everything, vocab):
        uniform = torch.from_numpy(columns.uniform[rows]).to(probabilities.device)
        tokens[rows] = draw(_rows(probabilities, rows), uniform).cpu().numpy()
    for blocks in (*BLOCKS, vocab):
        left = []
        for rows in _slices(undecided, min(blocks * BLOCK, vocab)):
            own = columns.rows(rows)
            candidates = most_probable(_rows(probabilities, rows), blocks)
            weights, certain = keep(candidates, own, vocab)
            tokens[rows] = _draw_by_id(candidates.ids, weights, own.uniform)
            left.append(rows[~certain])
        undecided = np.concatenate(left) if left else undecided
        if not len(undecided):
            break
    return tokens


def most_probable(probabilities: torch.Tensor, blocks: int) -> Candidates:
    """Candidates from that many blocks, or all tokens where these are no more.

    Args:
        probabilities: [rows, vocab] float32, none negative.
        blocks: how many blocks to look into.
    """
    values, ids, bound = in_highest_blocks(probabilities, blocks)
    # Float bits of positive numbers order as integers do, so one key orders by probability, then id
    keys = values.cpu().numpy().view(np.int32).astype(np.int64)
    np.invert(keys, out=keys)
    keys <<= _HALF
    keys |= ids.cpu().numpy()
    if bound is None:
        keys.sort(axis=-1)
        chosen, limit = keys, np.full((len(keys), 1), -1, dtype=np.float32)
    else:
        width = min(2 * blocks, keys.shape[-1] - 1)
        keys.partition(width, axis=-1)
        chosen = np.sort(keys[:, :width], axis=-1)
        limit = np.maximum(bound.cpu().numpy(), _decode(keys[:, width : width + 1]))
    return Candidates(_decode(chosen), chosen & _LOW, limit)


def in_highest_blocks(
    values: torch.Tensor, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The part of each row with its largest values.

    Args:
        values: [rows, vocab].
        blocks: how many blocks to look into, those with the largest maxima.

    Returns:
        Values and their ids [rows, n], in no order, and a bound [rows, 1]: a value above it is
        among them. Without a bound, they are all.
    """
    vocab = values.shape[-1]
    stride = vocab // BLOCK
    if blocks >= stride:
        return values, torch.arange(vocab, device=values.device).expand_as(values), None
    ends = stride * BLOCK
    peaks = values[:, :ends].view(-1, BLOCK, stride).amax(dim=1)
    starts = _highest(peaks, blocks)
    steps = torch.arange(0, ends, stride, device=values.device)
    ids = (steps.unsqueeze(-1) + starts.unsqueeze(1)).flatten(1)
    if ends < vocab:
        rest = torch.arange(ends, vocab, device=values.device).expand(len(values), -1)
        ids = torch.cat((ids, rest), dim=-1)
    return values.gather(-1, ids), ids, peaks.gather(-1, starts).amin(dim=-1, keepdim=True)


def keep(candidates: Candidates, columns: Columns, vocab: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Applies the rules: the weight of each candidate in the draw, 0 if it is dropped.

    Min-p drops tokens less probable than min_p × the most probable one (Nguyen et al., "Turning up
    the heat", 2024). Top-p is `sample_top_p` of Meta's llama/generation.py: a token is dropped when
    the mass before it is greater than top_p; with top_p ≥ 1 none is, whatever the sum rounds to.
    It measures mass among what top-k and min-p left.

    Returns:
        Weights [rows, n], and for which rows [rows] they are certainly those that all tokens as
        candidates would give.
    """
    ordered, top_p = candidates.probabilities, columns.top_p
    least = columns.min_p * ordered[:, :1]
    left = (np.arange(ordered.shape[-1]) < columns.top_k) & (ordered >= least)
    weights = np.where(left, ordered, np.float32(0))
    renormalized = (columns.top_k < vocab) | (columns.min_p > 0)
    total = weights.cumsum(axis=-1, dtype=np.float64)[:, -1:].astype(np.float32)
    shares = np.where(renormalized, weights / total, weights)
    mass = shares.cumsum(axis=-1, dtype=np.float64)
    mass_before = mass.astype(np.float32) - shares
    weights[(mass_before > top_p) & (top_p < 1)] = 0

    ranked = ordered > candidates.bound  # their rank among all tokens is known
    count = ranked.sum(axis=-1, keepdims=True)
    left_is_known = (columns.top_k <= count) | (candidates.bound < least)
    mass_ranked = np.max(mass, axis=-1, keepdims=True, where=ranked, initial=0.0)
    complete = ~renormalized & (top_p < 1) & (mass_ranked > top_p.astype(np.float64) + _ROUNDING)
    everything = candidates.bound < 0
    return weights, (left_is_known | complete | everything)[:, 0]


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: for each row the first id whose cumulated weight exceeds uniform × total.

    Args:
        weights: [rows, vocab], not normalised.
        uniform: [rows, 1] float64 in [0, 1 − 2⁻³²].
    """
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(-1)


def _draw_by_id(ids: Ids, weights: Floats, uniform: Doubles) -> Ids:
    """`draw` among candidates: tokens that are none weigh nothing."""
    width = np.flatnonzero((weights > 0).any(axis=0)).max(initial=0) + 1
    keys = (ids[:, :width] << _HALF) | weights[:, :width].view(np.int32)
    keys.sort(axis=-1)
    cumulated = (keys & _LOW).astype(np.int32).view(np.float32).cumsum(axis=-1, dtype=np.float64)
    chosen = (cumulated <= uniform * cumulated[:, -1:]).sum(axis=-1)
    tokens: Ids = keys[np.arange(len(keys)), chosen] >> _HALF
    return tokens


def _highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest values of each row are [rows, count], in no order."""
    if values.device.type == "cpu":  # where numpy's selection is twice as fast from 16 rows on
        return torch.from_numpy(np.argpartition(values.numpy(), -count)[:, -count:])
    return values.topk(count, dim=-1, sorted=False).indices


def _decode(keys: Ids) -> Floats:
    return (~(keys >> _HALF)).astype(np.int32).view(np.float32)


def _rows(values: torch.Tensor, rows: NDArray[np.intp]) -> torch.Tensor:
    return values if len(rows) == len(values) else values[torch.from_numpy(rows)]


def _slices(rows: NDArray[np.intp], width: int) -> list[NDArray[np.intp]]:
    size = max(1, _ELEMENTS_AT_ONCE // width)
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
