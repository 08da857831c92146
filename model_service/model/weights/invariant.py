"""Weights on CUDA for the mode that is batch-invariant: every format, for one family of kernels.

Unlike the forms of `cuda.py`, each serves any number of rows, and activations are never quantized:
so a row is multiplied by the same numbers in the same order in every step.
"""

import torch

from model_service.model.config import Quantization
from model_service.model.cuda.products import multiply
from model_service.model.cuda.tiled_weight import TiledWeight, four_bit_codes
from model_service.model.weights.matrices import Pack, PackedWeight
from model_service.model.weights.quantization import Fp8Weight, Int4Weight, Int8Weight


def pack_tiles(quantization: Quantization, dtype: torch.dtype) -> Pack:
    """The function that packs a weight in this format for activations of `dtype`."""

    def pack(weight: torch.Tensor) -> PackedWeight:
        tiled = _tiled(weight, quantization, dtype)
        return PackedWeight(lambda x: multiply(x, tiled), tiled)

    return pack


def _tiled(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> TiledWeight:
    """The weight in memory of its own."""
    outputs, inputs = weight.shape
    if quantization == "none":
        return TiledWeight(weight.to(dtype, copy=True).contiguous(), None, outputs, inputs)
    if quantization == "int4":
        groups = Int4Weight.quantize(weight)
        codes = four_bit_codes(groups.unpacked_codes())
        scales = torch.stack((groups.scales.t(), groups.minima.t()), dim=1).bfloat16()
        return TiledWeight(codes, scales.contiguous(), outputs, inputs)
    format_ = Int8Weight if quantization == "int8" else Fp8Weight
    scaled: Int8Weight | Fp8Weight = format_.quantize(weight)
    return TiledWeight(scaled.codes, scaled.scales, outputs, inputs)
