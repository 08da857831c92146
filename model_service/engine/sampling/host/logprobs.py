"""Logprobs on the host: of the chosen token, the most probable ones, and those asked for by id."""

from collections.abc import Iterable

import torch

from model_service.engine.sampling.host.truncation import in_highest_blocks
from model_service.engine.sequence import TokenLogprobs

_ROWS_SCORED_AT_ONCE = 16  # 2 MB of logprobs: a whole prompt's do not fit any processor's cache


def score(
    logits: torch.Tensor,
    targets: list[int],
    alternatives: list[int],
    requested: list[tuple[int, ...]],
) -> list[TokenLogprobs]:
    """Logprobs under the raw distribution.

    Args:
        logits: [rows, vocab] float32 as the network gave them.
        targets: [rows], the token that was chosen (or, in a prompt, stands) there.
        alternatives: [rows], how many of the most probable tokens to name.
        requested: [rows], tokens to score whatever their rank.
    """
    scores: list[TokenLogprobs] = []
    for part in torch.split(logits, _ROWS_SCORED_AT_ONCE):
        own = slice(len(scores), len(scores) + len(part))
        scores += _score_part(part, targets[own], alternatives[own], requested[own])
    return scores


def _score_part(
    logits: torch.Tensor,
    targets: list[int],
    alternatives: list[int],
    requested: list[tuple[int, ...]],
) -> list[TokenLogprobs]:
    # One fused kernel: logsumexp would read the logits four times and take longer.
    logprobs = torch.log_softmax(logits, dim=-1)
    indices = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    chosen = logprobs.gather(-1, indices)
    own = zip(chosen.squeeze(-1).tolist(), ranks(logprobs, chosen).tolist(), strict=True)
    top = _most_probable(logprobs, alternatives)
    others = [tuple(logprobs[i, [*ids]].tolist()) if ids else () for i, ids in enumerate(requested)]
    return [
        TokenLogprobs(logprob, rank, row_top, row_others)
        for (logprob, rank), row_top, row_others in zip(own, top, others, strict=True)
    ]


def ranks(logprobs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The places [rows] of the logprobs `chosen` [rows, 1] in their rows, from 1, the largest."""
    return (logprobs > chosen).sum(dim=-1) + 1


def _most_probable(
    logprobs: torch.Tensor, counts: list[int]
) -> Iterable[tuple[tuple[int, float], ...]]:
    """For each row as many of its most probable tokens, best first."""
    most = min(max(counts), logprobs.shape[-1])
    if not most:
        return [()] * len(counts)
    candidates, ids, _ = in_highest_blocks(logprobs, most)
    values, order = candidates.topk(most, dim=-1)
    rows = zip(ids.gather(-1, order).tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(ids[:count], values[:count], strict=True)) for ids, values, count in rows]
