"""How linear layers hold their weights on the CPU: packed for its matrix kernels, or quantized.

fairscale's layers keep their weight in an attribute and multiply by it with `F.linear`. A
`PackedWeight` stands in that attribute; PyTorch hands such a call over to it (the
`__torch_function__` protocol), so no layer knows in which form its weights are held. Each format is
one function that packs one weight: here the CPU's, in `weights_cuda.py` the GPU's; `packing.py`
chooses.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model_service.model.quantization import (
    GROUP_SIZE,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    fp8_rows,
)

Multiply = Callable[[torch.Tensor], torch.Tensor]

# A smaller matrix is multiplied sooner than the packed kernel has been set up.
_PREPACK_FROM = 2**20  # elements
# Products of 8-bit values are added in pairs in 16 bits where the CPU has no VNNI instructions;
# with 7 bits for the activations no pair overflows.
_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63  # noqa: SLF001  # the only way to ask
_ZERO_POINT = _LEVELS + 1
# With more rows the 4-bit kernel is slower than the 8-bit one; without AVX-512 it always is.
INT4_ROWS = 2 if torch.cpu._is_avx512_supported() else 0  # noqa: SLF001


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] in the form that its kernel reads.

    Attributes:
        multiply: takes x [rows, inputs] to x · weightᵀ [rows, outputs], in x's dtype.
    """

    multiply: Multiply

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: object = None,
    ) -> torch.Tensor:
        if function is not torch.nn.functional.linear:
            raise TypeError(f"a packed weight serves F.linear alone, not {function}")
        x, weight, *_ = args
        product: torch.Tensor = weight.multiply(x)
        return product


Pack = Callable[[torch.Tensor], torch.Tensor | PackedWeight]


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without them it is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001


def prepack(weight: torch.Tensor) -> torch.Tensor | PackedWeight:
    """Reordered once into the blocks that oneDNN's kernels read.

    With one row the plain layout reaches half of the memory's bandwidth, this one nearly all.
    """
    if weight.numel() < _PREPACK_FROM:
        return weight
    linear = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001  # what the compiler emits
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001

    def multiply(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = linear(x, packed, None, "none", [], "")
        return product

    return PackedWeight(multiply)


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of this dtype for this CPU; bfloat16 needs AVX-512 or newer."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(64, 64, dtype=dtype))  # noqa: SLF001
    except RuntimeError:
        return False
    return True


def pack_int8(weight: torch.Tensor) -> PackedWeight:
    """8-bit weights, multiplied by activations that are quantized row by row.

    One scale per row of activations, unlike torch's dynamic quantization with one for all: so a
    sequence's answer does not depend on which others share its step.
    """
    quantized = Int8Weight.quantize(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated; we pin
        tensor = torch._make_per_channel_quantized_tensor(  # noqa: SLF001  # of codes, not of floats
            quantized.codes,
            quantized.scales.double(),
            torch.zeros(len(weight), dtype=torch.long),
            axis=0,
        )
        packed = torch.ops.quantized.linear_prepack(tensor, None)
    linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def multiply(x: torch.Tensor) -> torch.Tensor:
        peaks = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
        # A row of zeros becomes NaN, then any 8-bit values, then zeros again.
        product: torch.Tensor = linear(x / peaks, 1 / _LEVELS, _ZERO_POINT, packed)
        return product.mul_(peaks).to(x.dtype)

    return PackedWeight(multiply)


def pack_int4(weight: torch.Tensor) -> PackedWeight:
    """4-bit weights for a few rows, and their 8-bit form where that is faster."""
    quantized = Int4Weight.quantize(weight)
    many_rows = pack_int8(quantized.dequantize())
    if not INT4_ROWS:
        return many_rows
    codes = torch._convert_weight_to_int4pack_for_cpu(quantized.unpacked_codes().int(), 1)  # noqa: SLF001
    # The kernel takes codes as -8 to 7.
    zeros = quantized.minima + 8 * quantized.scales
    scales = torch.stack((quantized.scales.t(), zeros.t()), dim=-1).bfloat16().contiguous()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if len(x) > INT4_ROWS:
            return many_rows.multiply(x)
        return torch._weight_int4pack_mm_for_cpu(  # noqa: SLF001
            x.bfloat16(), codes, GROUP_SIZE, scales
        ).to(x.dtype)

    return PackedWeight(multiply)


def pack_fp8(weight: torch.Tensor) -> PackedWeight:
    """e4m3 weights and activations, a scale per row of each; summed in float32.

    No CPU multiplies such codes, so they are held as the float32 numbers that they stand for: what
    a GPU computes, to try it out, not its speed or memory.
    """
    quantized = Fp8Weight.quantize(weight)
    codes = prepack(quantized.codes.float())

    def multiply(x: torch.Tensor) -> torch.Tensor:
        row_codes, scales = fp8_rows(x)
        product = torch.nn.functional.linear(row_codes.float(), codes)  # type: ignore[arg-type]
        return product.mul_(scales.unsqueeze(1)).mul_(quantized.scales).to(x.dtype)

    return PackedWeight(multiply)
