"""Top-k, min-p, top-p and the draw, on any device and without the host knowing a number.

The rules are those of `truncation.keep`, which has their sources, applied to all tokens: whether a
few hundred candidates are enough would be the host's decision. In the same order and precision, so
on a CPU every choice is the same to the last bit; on CUDA sums run in parallel, in float64.
"""

from dataclasses import dataclass

import torch

# Working memory of one pass: some 30 bytes per row and token of the vocabulary.
_ROWS_AT_ONCE = 256
_HALF = 32
_POSITIVE = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Rules:
    """One column per parameter, [rows, 1]; on the device."""

    top_k: torch.Tensor  # int64; the vocabulary's size where it is off
    min_p: torch.Tensor  # float32
    top_p: torch.Tensor  # float32


def draw_truncated(
    probabilities: torch.Tensor, rules: Rules, uniform: torch.Tensor
) -> torch.Tensor:
    """One token per row [rows], among those that the row's rules keep.

    Args:
        probabilities: [rows, vocab] float32.
        rules: the rows' parameters.
        uniform: [rows, 1] float64 in [0, 1 − 2⁻³²].
    """
    columns = (probabilities, rules.top_k, rules.min_p, rules.top_p, uniform)
    parts = zip(*(torch.split(column, _ROWS_AT_ONCE) for column in columns), strict=True)
    drawn = [_draw(truncate(part, Rules(*rule)), numbers) for part, *rule, numbers in parts]
    return torch.cat(drawn)


def truncate(probabilities: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Weights [rows, vocab]: the probabilities, 0 where the rules drop a token."""
    vocab = probabilities.shape[-1]
    ordered, ids = _descending(probabilities)
    ranks = torch.arange(vocab, device=probabilities.device)
    left = (ranks < rules.top_k) & (ordered >= rules.min_p * ordered[:, :1])
    weights = ordered.masked_fill_(~left, 0.0)
    total = weights.cumsum(dim=-1, dtype=torch.float64)[:, -1:].float()
    renormalized = (rules.top_k < vocab) | (rules.min_p > 0)
    shares = torch.where(renormalized, weights / total, weights)
    mass_before = shares.cumsum(dim=-1, dtype=torch.float64).float().sub_(shares)
    weights.masked_fill_((mass_before > rules.top_p) & (rules.top_p < 1), 0.0)
    return torch.empty_like(probabilities).scatter_(-1, ids, weights)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: for each row the first id whose cumulated weight exceeds uniform × total.

    Args:
        weights: [rows, vocab], not normalised.
        uniform: [rows, 1] float64 in [0, 1 − 2⁻³²].
    """
    parts = (torch.split(column, _ROWS_AT_ONCE) for column in (weights, uniform))
    return torch.cat([_draw(*part) for part in zip(*parts, strict=True)])


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    # A sum that runs in parallel may rise by a rounding where a token without weight stands.
    beyond = (cumulated > uniform * cumulated[:, -1:]) & (weights > 0)
    return beyond.to(torch.uint8).argmax(dim=-1)  # the first, also of a row that has none: id 0


def _descending(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and their ids [rows, vocab], the lowest id first among equals.

    One sort of all rows together: PyTorch's CUDA sort takes long rows one after the other.
    """
    rows, vocab = probabilities.shape
    # Bits of positive floats order as integers do.
    keys = _POSITIVE - probabilities.view(torch.int32).long()
    keys += torch.arange(rows, device=keys.device).unsqueeze(-1) << _HALF
    ids = keys.flatten().sort(stable=True).indices.view(rows, vocab) % vocab
    return probabilities.gather(-1, ids), ids
