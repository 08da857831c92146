"""How linear layers hold their weights on the CPU: packed for its matrix kernels, or quantized.

fairscale's layers keep their weight in an attribute and multiply by it with `F.linear`. A
`PackedWeight` stands in that attribute; PyTorch hands such a call over to it (the
`__torch_function__` protocol), so no layer knows in which form its weights are held. Each format is
one function that packs one weight: here the CPU's, in `weights_cuda.py` the GPU's; `packing.py`
chooses.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model_service.model import cpu
from model_service.model.weights.quantization import Fp8Weight, Int4Weight, Int8Weight, fp8_rows

Multiply = Callable[[torch.Tensor], torch.Tensor]

# A smaller matrix is multiplied sooner than the packed kernel has been set up.
_PREPACK_FROM = 2**20  # elements


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
    # Pairs of products with 7-bit activations do not overflow 16 bits.
    levels = 127 if cpu.adds_products_exactly() else 63

    def multiply(x: torch.Tensor) -> torch.Tensor:
        peaks = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
        # A row of zeros becomes NaN, then any 8-bit values, then zeros again.
        product: torch.Tensor = linear(x / peaks, 1 / levels, levels + 1, packed)
        return product.mul_(peaks).to(x.dtype)

    return PackedWeight(multiply)


def pack_int4(weight: torch.Tensor) -> PackedWeight:
    """4-bit weights in the form of 8-bit ones.

    PyTorch's 4-bit kernel for the CPU rounds activations and scales to bfloat16 and is slow for
    more than a few rows. Mixing both kernels would make an answer depend on how many rows share
    its step.
    """
    return pack_int8(Int4Weight.quantize(weight).dequantize())


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
