"""Inputs and definitions of the kernels that are batch-invariant on CUDA, in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from model_service.model.attention.backend import SequenceSpan
from model_service.model.config import Quantization
from model_service.model.cuda.tiled_weight import TiledWeight
from model_service.model.weights.invariant import pack_tiles
from model_service.model.weights.matrices import PackedWeight
from model_service.model.weights.quantization import FORMATS

EPS = 1e-5
FORMAT_NAMES: tuple[Quantization, ...] = ("none", *FORMATS)


def tiled(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> TiledWeight:
    packed = pack_tiles(quantization, dtype)(weight)
    assert isinstance(packed, PackedWeight)
    assert isinstance(packed.blocks, TiledWeight)
    return packed.blocks


def exact(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [outputs, inputs] float32 by which a kernel multiplies."""
    if quantization == "none":
        return weight.to(dtype).float()
    held = FORMATS[quantization].quantize(weight)
    whole = held.narrow(0, 0, len(weight))
    # 4-bit codes become numbers of the activations' type, 8-bit ones are exact in it.
    return whole.to(dtype).float() if quantization == "int4" else whole


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS).float()


def rotated(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Heads [tokens, heads, head_dim] float32."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2)


def attention(
    query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], spans: Sequence[SequenceSpan]
) -> torch.Tensor:
    """Causal attention [tokens, heads, head_dim] float32; each sequence's keys in their order."""
    parts, begin, block_size = [], 0, cache[0].shape[1]
    for span in spans:
        length, count = span.context_length, span.query_length
        positions = range(length)
        slots = [span.block_table[p // block_size] * block_size + p % block_size for p in positions]
        own = query[begin : begin + count].float()
        begin += count
        shared = query.shape[1] // cache[0].shape[2]
        key, value = (
            each.flatten(0, 1)[slots].float().repeat_interleave(shared, dim=1) for each in cache
        )
        scores = torch.einsum("qhd,khd->hqk", own, key) / math.sqrt(query.shape[-1])
        seen = torch.ones(count, length).tril(length - count).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(parts)
