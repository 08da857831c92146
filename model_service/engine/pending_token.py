"""A pending token stands in a sequence for one that the step in flight samples.

The host knows only that it will come, so its value is negative: the complement of its index among
the tokens that the step samples. Every rank replaces it on its device, where that token is.
"""

import torch


def pending_token(index: int) -> int:
    """The placeholder for the `index`-th token that the step in flight samples."""
    return ~index


def is_pending(token: int) -> bool:
    return token < 0


def resolve_pending(tokens: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    """`tokens` [n] with every pending one replaced by that entry of `sampled`, which has some."""
    return torch.where(tokens < 0, sampled[(~tokens).clamp_(min=0)], tokens)
