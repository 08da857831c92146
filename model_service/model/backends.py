"""Which attention backend a rank computes with, decided once when it loads."""

import torch

from model_service.model.attention import AttentionBackend, CacheShape, SdpaAttention
from serving.errors import StartError


def make_attention(
    shape: CacheShape,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype,
    *,
    heads: int,  # noqa: ARG001
    max_batch_size: int,  # noqa: ARG001
) -> AttentionBackend:
    """The fastest backend that computes this, with its cache allocated.

    Args:
        shape: of this rank's cache.
        dtype: of queries, keys and values as the network makes them.
        device: of this rank.
        kv_dtype: how the cache holds keys and values: `dtype`, or torch.float8_e4m3fn.
        heads: query heads of this rank.
        max_batch_size: most sequences that run at once.
    """
    if kv_dtype != dtype:
        raise StartError(
            "no attention backend here reads a cache in fp8: use --kv_cache_dtype auto"
        )
    return SdpaAttention(shape, dtype, device)
