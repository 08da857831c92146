"""One call of PyTorch's attention, over the keys of one span or of many spans of one token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Up to this many tokens of a span, reading each key once for all heads that share it saves more
# than a mask with a row for each of these heads costs.
_MAX_TOKENS_AS_ROWS = 16


@dataclass(frozen=True, slots=True)
class Group:
    """The spans of one attention call: a single one, or many of one token."""

    rows: slice | torch.Tensor  # of the flat batch: [tokens], span after span
    spans: int
    # Slots of keys and values [spans × longest], which are copied, or a slice, read in place.
    slots: slice | torch.Tensor
    # Added to the scores: [spans, 1, tokens of a span, longest]. None hides nothing.
    mask: torch.Tensor | None = None
    causal: bool = False


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, *, with_sums: bool
) -> list[torch.Tensor]:
    """Attention of query [tokens, heads, head_dim] over [spans × longest, kv_heads, head_dim].

    Returns:
        [tokens, heads, head_dim], and `with_sums` the logarithms of the sums of exponentials
        [tokens, heads, 1].
    """
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if tokens <= group.spans * _MAX_TOKENS_AS_ROWS and not group.causal:
        # [spans, kv_heads, tokens of a span × heads that share, head_dim]
        sharing = heads // kv_heads
        rows = query.view(group.spans, -1, kv_heads, sharing, head_dim).transpose(1, 2)
        key, value = (
            each.view(group.spans, -1, kv_heads, head_dim).transpose(1, 2) for each in (key, value)
        )
        mask = group.mask
        if mask is not None:
            mask = mask.unsqueeze(3).expand(-1, -1, -1, sharing, -1).flatten(2, 3)
        attended = _kernel(rows.flatten(2, 3), key, value, mask, with_sums=with_sums)
        attended = [each.view(*rows.shape[:-1], -1).transpose(1, 2) for each in attended]
    else:
        # [kv_heads, heads that share, tokens, head_dim], the key of each with stride 0.
        rows = query.view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        key, value = (
            each.transpose(0, 1).unsqueeze(1).expand(-1, rows.shape[1], -1, -1)
            for each in (key, value)
        )
        attended = _kernel(rows, key, value, group.mask, causal=group.causal, with_sums=with_sums)
        attended = [each.permute(2, 0, 1, 3) for each in attended]
    return [each.reshape(tokens, heads, -1) for each in attended]


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
    with_sums: bool,
) -> list[torch.Tensor]:
    """scaled_dot_product_attention of [..., tokens, head_dim].

    That function does not return the sums, but the CPU kernel below it does.
    """
    if not with_sums:
        return [F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    attended, sums = kernel(query, key, value, attn_mask=mask, is_causal=causal)
    return [attended, sums.unsqueeze(-1)]


def merged(
    parts: Sequence[Sequence[torch.Tensor]], rows: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Attention over all parts together.

    Args:
        parts: attention [tokens, heads, head_dim] and sums [tokens, heads, 1] of each.
        rows: the batch's row of each token in all parts.
        like: [tokens of the batch, heads, head_dim].
    """
    attended, sums = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = like.shape[0], *sums.shape[1:]
    index = rows.view(-1, 1, 1).expand_as(sums)
    largest = sums.new_full(shape, -torch.inf).scatter_reduce_(0, index, sums, "amax")
    weights = (sums - largest[rows]).exp()
    total = weights.new_zeros(shape).index_add_(0, rows, weights)
    weighted = weights.new_zeros(like.shape).index_add_(0, rows, attended * weights)
    return (weighted / total).to(like.dtype)
