"""Quantized weights on CUDA: the formats of `quantization.py` in the forms that GPU kernels read.

With few rows a step takes as long as it reads weights, so kernels that dequantize codes as they
read them gain what the codes save. With many rows the matrix units limit the step: 8- and 4-bit
integers are dequantized once and multiplied by cuBLAS, and e4m3 is multiplied as it is. The bounds
below, where one begins to beat the other, are estimates for Hopper from bytes and rates and were
not measured. No function here waits for the device, so a CUDA graph can hold them.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch.nn import functional as F

from model_service.model.config import Quantization
from model_service.model.weights.matrices import Multiply, PackedWeight
from model_service.model.weights.quantization import (
    GROUP_SIZE,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    fp8_rows,
)

# PyTorch's CUDA builds include Triton; its CPU builds, which take the other paths, do not.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
if _HAS_TRITON:
    from model_service.model.cuda import weight_kernels as kernels

# The most rows for the kernels that dequantize as they read.
_MAX_INT8_ROWS = 256  # above, cuBLAS makes up for the time that writing plain weights costs
_MAX_INT4_ROWS = 64  # because the kernel dequantizes again for every 16 rows
_MAX_FP8_ROWS = 16  # above, quantizing the activations pays
# The most tiles of 16 inputs that the 4-bit kernel can read at once.
_MAX_INNER_TILES = 8
_SIGNED = 8  # the 4-bit kernel reads codes as -8 to 7


def pack_int8(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """8-bit weights and plain activations; sums are float32, scaled at the end."""
    quantized = Int8Weight.quantize(weight)
    codes, scales = quantized.codes, quantized.scales
    fused = _HAS_TRITON and weight.is_cuda and kernels.can_multiply(codes)
    if fused:
        kernels.compile_for(codes, scales, dtype, _MAX_INT8_ROWS)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if fused and len(x) <= _MAX_INT8_ROWS:
            return kernels.multiply(x, codes, scales)
        dequantized = x.new_empty(codes.shape)
        # One kernel without a float32 copy, because it converts as it writes to `out`.
        torch.mul(codes, scales.unsqueeze(1), out=dequantized)
        return F.linear(x, dequantized)

    return _packed(multiply, len(codes))


def pack_int4(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """4-bit weights in the layout of PyTorch's tinygemm kernel.

    Raises:
        ValueError: `dtype` is not bfloat16, the only one that the kernel supports.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"the 4-bit kernel multiplies bfloat16, not {dtype}")
    quantized = Int4Weight.quantize(weight)
    inner_tiles = tinygemm_inner_tiles(weight.shape[1])
    # The kernel reads the even input's code from the high half of a byte.
    swapped = quantized.codes << 4 | quantized.codes >> 4
    tiles = torch._convert_weight_to_int4pack(swapped, inner_tiles)  # noqa: SLF001  # no public name
    scales = tinygemm_scales(quantized)
    fused = _HAS_TRITON and weight.is_cuda
    if fused:
        kernels.require_compiler()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if len(x) <= _MAX_INT4_ROWS:
            product: torch.Tensor = torch._weight_int4pack_mm(  # noqa: SLF001
                x.contiguous(), tiles, GROUP_SIZE, scales
            )
            return product
        unpack = kernels.unpack_int4 if fused else dequantize_tinygemm
        return F.linear(x, unpack(tiles, scales))

    return _packed(multiply, len(weight))


def tinygemm_inner_tiles(inputs: int) -> int:
    """The number of adjacent tiles of 16 inputs, for a row of `inputs`, a multiple of 32."""
    tiles = _MAX_INNER_TILES
    while inputs % (16 * tiles):
        tiles //= 2
    return tiles


def tinygemm_scales(quantized: Int4Weight) -> torch.Tensor:
    """[inputs / GROUP_SIZE, outputs, 2] bfloat16: scale, and the value of the code 0 of -8 to 7."""
    zeros = quantized.minima + _SIGNED * quantized.scales
    return torch.stack((quantized.scales.t(), zeros.t()), dim=-1).bfloat16().contiguous()


def tinygemm_codes(tiles: torch.Tensor) -> torch.Tensor:
    """The codes [outputs, inputs] uint8, 0 to 15, from the kernel's layout.

    Args:
        tiles: int32 [outputs / 8, inputs / (16 · inner), 32, inner / 2] as
            `_convert_weight_to_int4pack` gives it (`matrix_to_m16n8k16_Bint4_layout` in PyTorch's
            aten/src/ATen/native/cuda/int4mm.cu): lane 4 · o + q holds, of output o of 8, the inputs
            2q and 2q + 1 of each 8; of an integer's eight codes, the low four are of even inputs.
    """
    octets, blocks, _, pairs = tiles.shape
    bytes_ = tiles.view(torch.uint8).view(octets, blocks, 8, 4, pairs, 2, 2)
    halves = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1)
    # [octet, block, output, q, pair, parity, 16 inputs, 8 inputs] in the order of a matrix.
    ordered = halves.permute(0, 2, 1, 4, 6, 7, 3, 5)
    return ordered.reshape(8 * octets, 32 * blocks * pairs)


def dequantize_tinygemm(tiles: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights [outputs, inputs] in bfloat16, as the kernel multiplies by them.

    Args:
        tiles: as for `tinygemm_codes`.
        scales: as `tinygemm_scales` gives them.
    """
    codes = tinygemm_codes(tiles)
    groups = codes.view(len(codes), -1, GROUP_SIZE).float() - _SIGNED
    scale, zero = (each.t().float().unsqueeze(2) for each in scales.unbind(dim=-1))
    return (groups * scale + zero).bfloat16().flatten(1)


def pack_fp8(weight: torch.Tensor, dtype: torch.dtype) -> PackedWeight:
    """e4m3 weights; for many rows also e4m3 activations, which Hopper's matrix units multiply.

    A few rows are not quantized, because that would cost more time than it gains.
    """
    quantized = Fp8Weight.quantize(weight)
    codes, scales = quantized.codes, quantized.scales
    fused = _HAS_TRITON and weight.is_cuda and kernels.can_multiply(codes)
    if fused:
        kernels.compile_for(codes, scales, dtype, _MAX_FP8_ROWS)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if fused and len(x) <= _MAX_FP8_ROWS:
            return kernels.multiply(x, codes, scales)
        rows, row_scales = kernels.fp8_rows(x) if fused else fp8_rows(x)
        # Row-wise scales need a bfloat16 result. Fast accumulation keeps fewer bits of the sums
        # than float32 has but far more than the factors have; torchao chooses it, too.
        product: torch.Tensor = torch._scaled_mm(  # noqa: SLF001  # what torchao calls
            rows,
            codes.t(),
            scale_a=row_scales.unsqueeze(1),
            scale_b=scales.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.to(x.dtype)

    return _packed(multiply, len(weight))


def _packed(multiply: Multiply, outputs: int) -> PackedWeight:
    """Skips the kernel for a step without logits: it cannot be launched for no rows."""

    def multiply_some(x: torch.Tensor) -> torch.Tensor:
        return multiply(x) if len(x) else x.new_empty(0, outputs)

    return PackedWeight(multiply_some)


PACK: dict[Quantization, Callable[[torch.Tensor, torch.dtype], PackedWeight]] = {
    "int8": pack_int8,
    "int4": pack_int4,
    "fp8": pack_fp8,
}
