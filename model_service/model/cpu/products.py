"""Products with weights in the blocks of source/products: each output sums in one fixed order."""

import ctypes

import torch

from model_service.model.cpu.library import declare

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p

_SIGNATURES = {
    "chasqui_packed_size": (_INT, _INT),
    "chasqui_pack": (_POINTER, _INT, _INT, _POINTER, _INT),
    "chasqui_multiply": (_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT),
}


class Products:
    """The library's products, in bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        library.chasqui_packed_size.restype = ctypes.c_long
        self._library = library

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [outputs, inputs] in the blocks that `multiply` reads."""
        weight = weight.contiguous()
        blocks = weight.new_empty(self._library.chasqui_packed_size(*weight.shape))
        self._library.chasqui_pack(
            weight.data_ptr(), *weight.shape, blocks.data_ptr(), torch.get_num_threads()
        )
        return blocks

    def multiply(self, x: torch.Tensor, blocks: torch.Tensor, outputs: int) -> torch.Tensor:
        """X [rows, inputs] · weightᵀ [rows, outputs], summed in float32."""
        x = x.contiguous()
        rows, inputs = x.shape
        product = x.new_empty(rows, outputs)
        self._library.chasqui_multiply(
            blocks.data_ptr(),
            outputs,
            inputs,
            x.data_ptr(),
            rows,
            product.data_ptr(),
            torch.get_num_threads(),
        )
        return product
