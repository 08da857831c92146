"""The weights of linear layers on the CPU, packed for its matrix kernels or quantized.

A layer keeps its weight in an attribute and multiplies by it with `F.linear`. If the attribute is a
`PackedWeight`, PyTorch passes the call on to it (the `__torch_function__` protocol), so no layer
knows the form of its weights. Each format is one function that packs one weight: for the CPU here,
for the GPU in `cuda.py` and `invariant.py`. `packing.py` chooses.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model_service.model.cpu.instructions import adds_products_exactly
from model_service.model.cpu.products import Form, PackedBlocks, Products
from model_service.model.cuda.tiled_weight import TiledWeight
from model_service.model.weights.quantization import Fp8Weight, Int4Weight, Int8Weight, fp8_rows

Multiply = Callable[[torch.Tensor], torch.Tensor]

# Setting up the packed kernel takes longer than multiplying by a smaller matrix.
_MIN_PACKED_SIZE = 2**20  # elements


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] in the form that its kernel reads.

    Attributes:
        multiply: computes x · weightᵀ [rows, outputs] from x [rows, inputs], in x's dtype.
        blocks: the weight, if kernels that compute whole layers read its form.
    """

    multiply: Multiply
    blocks: PackedBlocks | TiledWeight | None = None

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
    """The weight in the blocks that oneDNN's kernels read.

    With one row of activations, the plain layout reaches half of the memory's bandwidth and the
    packed one nearly all.
    """
    if weight.numel() < _MIN_PACKED_SIZE:
        return weight
    linear = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001  # what the compiler emits
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001

    def multiply(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = linear(x, packed, None, "none", [], "")
        return product

    return PackedWeight(multiply)


def pack_blocks(products: Products, form: Form) -> Pack:
    """Packs weights for the kernels that sum in one order for any number of rows."""

    def pack(weight: torch.Tensor) -> PackedWeight:
        blocks = products.pack(weight, form)
        return PackedWeight(lambda x: products.multiply(x, blocks), blocks)

    return pack


def pack_int8(weight: torch.Tensor) -> PackedWeight:
    """8-bit weights, multiplied by activations that are quantized row by row, in PyTorch.

    Each row of activations has its own scale, unlike in torch's dynamic quantization. So a
    sequence's answer does not depend on the other sequences of its steps.
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
    # With 7-bit activations, pairs of products do not overflow 16 bits.
    levels = 127 if adds_products_exactly() else 63

    def multiply(x: torch.Tensor) -> torch.Tensor:
        peaks = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
        # A row of zeros becomes NaN, then arbitrary 8-bit values, then zeros again.
        product: torch.Tensor = linear(x / peaks, 1 / levels, levels + 1, packed)
        return product.mul_(peaks).to(x.dtype)

    return PackedWeight(multiply)


def pack_int4(weight: torch.Tensor) -> PackedWeight:
    """4-bit weights in the form of 8-bit ones, in PyTorch.

    PyTorch's 4-bit kernel for the CPU rounds activations and scales to bfloat16 and is slow for
    more than a few rows. Using both kernels would make an answer depend on the number of rows in
    its steps.
    """
    return pack_int8(Int4Weight.quantize(weight).dequantize())


def pack_fp8(pack_codes: Pack = prepack) -> Pack:
    """Packs e4m3 weights; activations are e4m3, too, with a scale per row of each.

    The codes are kept as float32 numbers, because no CPU multiplies e4m3. So this computes what a
    GPU computes, for trying it out, but saves neither time nor memory.

    Args:
        pack_codes: packs the codes in float32.
    """

    def pack(weight: torch.Tensor) -> PackedWeight:
        quantized = Fp8Weight.quantize(weight)
        codes = pack_codes(quantized.codes.float())

        def multiply(x: torch.Tensor) -> torch.Tensor:
            row_codes, scales = fp8_rows(x)
            product = torch.nn.functional.linear(row_codes.float(), codes)  # type: ignore[arg-type]
            return product.mul_(scales.unsqueeze(1)).mul_(quantized.scales).to(x.dtype)

        return PackedWeight(multiply)

    return pack
