"""Top-k, min-p, top-p and the draw on the device, without the host seeing a number.

The rules are those of `host_truncation.keep`, which has their sources, applied to all tokens:
whether a few hundred candidates are enough would be the host's decision. Order and precision are
the same, so on a CPU every choice is equal to the last bit; on CUDA sums run in parallel, in
float64.
"""

import torch

from model_service.engine.sampling.columns import DrawColumns

# Working memory of one pass: some 30 bytes per row and token of the vocabulary.
_ROWS_AT_ONCE = 256
_HALF = 32
_POSITIVE = 0x7FFFFFFF


def draw_truncated(probabilities: torch.Tensor, columns: DrawColumns[torch.Tensor]) -> torch.Tensor:
    """One token per row [rows], among those that the row's rules keep.

    Args:
        probabilities: [rows, vocab] float32.
        columns: the rows' parameters, on the device.
    """
    tokens = []
    for begin in range(0, len(probabilities), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        part = columns.rows(rows)
        tokens.append(_draw(truncate(probabilities[rows], part), part.uniform))
    return torch.cat(tokens)


def truncate(probabilities: torch.Tensor, columns: DrawColumns[torch.Tensor]) -> torch.Tensor:
    """Weights [rows, vocab]: the probabilities, 0 where the rules drop a token."""
    vocab = probabilities.shape[-1]
    ordered, ids = _descending(probabilities)
    ranks = torch.arange(vocab, device=probabilities.device)
    left = (ranks < columns.top_k) & (ordered >= columns.min_p * ordered[:, :1])
    weights = ordered.masked_fill_(~left, 0.0)
    total = weights.cumsum(dim=-1, dtype=torch.float64)[:, -1:].float()
    renormalized = (columns.top_k < vocab) | (columns.min_p > 0)
    shares = torch.where(renormalized, weights / total, weights)
    mass_before = shares.cumsum(dim=-1, dtype=torch.float64).float().sub_(shares)
    weights.masked_fill_((mass_before > columns.top_p) & (columns.top_p < 1), 0.0)
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
