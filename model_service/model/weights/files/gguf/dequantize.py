"""Dequantizes the blocks of GGUF files, bit for bit as the gguf package does.

The commonest types are computed by PyTorch, three times as fast as by the package in numpy: eight
codes at a time, as the bytes of one integer. The layout of blocks is that of ggml-common.h in ggml.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_in_numpy
from numpy.typing import NDArray

_NIBBLES = 0x0F0F0F0F0F0F0F0F
_PAIRS_OF_BITS = 0x0303030303030303


def dequantize(blocks: NDArray[np.uint8], kind: GGMLQuantizationType) -> torch.Tensor:
    """The weights of `blocks` [rows, bytes of whole blocks] in float32, in one dimension.

    Args:
        blocks: may be a part of a mapped file.
        kind: the blocks' type, which is not a plain one.
    """
    own = _IN_TORCH.get(kind)
    if own is None:
        # As one row, because the package goes through rows in small groups.
        return torch.from_numpy(dequantize_in_numpy(blocks.reshape(1, -1), kind)).view(-1)
    size = GGML_QUANT_SIZES[kind][1]
    return own(torch.from_numpy(blocks.reshape(-1, size))).view(-1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_float16(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:], 16).view(-1, 32).float().sub_(8).mul_(_float16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 4:], 16).view(-1, 32).float()
    return codes.mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of 256 weights in 8 groups, whose scales and minima have 6 bits."""
    low, middle, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
    codes = _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).float()
    codes.mul_((_float16(blocks, 0) * scales).unsqueeze(2))
    return codes.sub_((_float16(blocks, 2) * minima).unsqueeze(2))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of 256 weights in 16 groups: four low bits of each, then two high bits."""
    low = _nibbles(blocks[:, :128], 64).view(torch.int64).view(-1, 2, 4, 4)
    packed = _integers(blocks[:, 128:192]).view(-1, 2, 4)
    high = torch.stack([packed >> shift for shift in (0, 2, 4, 6)], dim=2)
    codes = low | ((high & _PAIRS_OF_BITS) << 4)
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return codes.view(torch.int8).view(-1, 16, 16).float().sub_(32).mul_(scales.unsqueeze(2))


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """The low halves of each `run` of bytes, then the high ones: int8, in one dimension."""
    integers = _integers(packed).view(-1, run // 8)
    return torch.stack((integers, integers >> 4), dim=1).bitwise_and_(_NIBBLES).view(torch.int8)


def _integers(packed: torch.Tensor) -> torch.Tensor:
    """Bytes as integers of eight, in memory that begins where an integer may begin."""
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int64)


def _float16(blocks: torch.Tensor, begin: int) -> torch.Tensor:
    """A scale per block [blocks, 1] in float32."""
    scale = blocks[:, begin : begin + 2].clone(memory_format=torch.contiguous_format)
    return scale.view(torch.float16).float()


_IN_TORCH: Mapping[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
