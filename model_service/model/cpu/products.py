"""Products with weights in the blocks of source/products: each output sums in one fixed order."""

import ctypes
import enum
from dataclasses import dataclass

import torch

from model_service.model.cpu.library import declare

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p

_SIGNATURES = {
    "chasqui_packed_size": (_POINTER,),
    "chasqui_pack": (_INT, _POINTER, _POINTER, _INT),
    "chasqui_multiply": (_INT, _POINTER, _POINTER, _INT, _POINTER, _INT),
    "chasqui_product_seconds": (),
}
# Types of activations, and of weights before they are packed, as `Type` in products.h numbers them.
_TYPES = {torch.bfloat16: 0, torch.float32: 1}


class Form(enum.IntEnum):
    """How a packed weight's numbers are kept, as `Form` in products.h numbers them.

    BFLOAT16 and FLOAT32 are multiplied by activations of the same type. INT8 and INT4 are those of
    `Int8Weight` and `Int4Weight`; they are multiplied by activations of either type, which are
    quantized to 8 bits: for INT8 with one scale for each row, for INT4 with one for each group.
    """

    BFLOAT16 = 0
    FLOAT32 = 1
    INT8 = 2
    INT4 = 3


class Weight(ctypes.Structure):
    """A packed weight; see source/products/products.h."""

    _fields_ = (
        ("form", _INT),
        ("lines", _POINTER),
        ("outputs", _INT),
        ("inputs", _INT),
    )


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """A packed weight with the memory that it points to."""

    weight: Weight
    memory: torch.Tensor


class Products:
    """The library's products."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        library.chasqui_packed_size.restype = ctypes.c_long
        library.chasqui_product_seconds.restype = ctypes.c_double
        self._library = library

    def pack(self, weight: torch.Tensor, form: Form) -> PackedBlocks:
        """Packs and quantizes a weight [outputs, inputs], float32 or bfloat16.

        Reads it once and needs no memory but that of the result. BFLOAT16 and FLOAT32 are for
        weights of this type; for INT4, `GROUP_SIZE` must divide the inputs.
        """
        weight = weight.contiguous()
        packed = Weight(form, None, *weight.shape)
        memory = torch.empty(
            self._library.chasqui_packed_size(ctypes.byref(packed)), dtype=torch.uint8
        )
        packed.lines = memory.data_ptr()
        self._library.chasqui_pack(
            _TYPES[weight.dtype],
            weight.data_ptr(),
            ctypes.byref(packed),
            torch.get_num_threads(),
        )
        return PackedBlocks(packed, memory)

    def multiply(self, x: torch.Tensor, blocks: PackedBlocks) -> torch.Tensor:
        """X [rows, inputs] · weightᵀ [rows, outputs], in x's dtype."""
        x = x.contiguous()
        product = x.new_empty(len(x), blocks.weight.outputs)
        self._library.chasqui_multiply(
            _TYPES[x.dtype],
            ctypes.byref(blocks.weight),
            x.data_ptr(),
            len(x),
            product.data_ptr(),
            torch.get_num_threads(),
        )
        return product

    def seconds(self) -> float:
        """The time that the calling thread spent in products since the last call."""
        return float(self._library.chasqui_product_seconds())
