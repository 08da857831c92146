"""The compiled kernels beside the products: norms, rotary embedding, SwiGLU's gate, attention.

Each computes a row of its input in one order of operations, whatever the number of rows and threads
is. So a token's logits do not depend on the other tokens of its step, unlike with the kernels of
PyTorch, which choose an order for each shape.

`kernels_for` finds them; `library.py` says when there are none.
"""

import ctypes
import functools

import torch

from model_service.model.cpu.library import declare, find_library
from model_service.model.cpu.products import Products

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_void_p

# `Type` in source/products/products.h.
ELEMENT_TYPES = {torch.bfloat16: 0, torch.float32: 1}


class AttentionCache(ctypes.Structure):
    """One layer's keys and values; see source/kernels/kernels.h."""

    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("eight_bits", _INT),
        ("kv_heads", _INT),
        ("head_dim", _INT),
        ("block_size", _INT),
    )


class AttentionSpan(ctypes.Structure):
    """One sequence's part of the flat batch; see source/kernels/kernels.h."""

    _fields_ = (
        ("table", _POINTER),
        ("row", _INT),
        ("query_length", _INT),
        ("context_length", _INT),
    )


_SIGNATURES = {
    "chasqui_norm": (
        *(_INT, _POINTER, _POINTER, _POINTER, ctypes.c_float),
        *(_INT, _INT, _POINTER, _INT),
    ),
    "chasqui_rotate": (_INT, _POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT),
    "chasqui_gate": (_INT, _POINTER, _INT, _INT, _POINTER, _INT),
    "chasqui_attend": (
        *(_INT, _POINTER, _POINTER, _INT, _INT),
        *(_POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT),
    ),
    "chasqui_layers": (_POINTER, _POINTER, _INT, _INT),
    "chasqui_step": (_POINTER, _POINTER, _INT, _POINTER, _POINTER),
}


class Kernels:
    """The library's functions on tensors of one dtype.

    Attributes:
        type: the dtype as the library numbers it.
        products: with weights that are packed for the library.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        """Takes the library and bfloat16 or float32."""
        declare(library, _SIGNATURES)
        self._library = library
        self.type = ELEMENT_TYPES[dtype]
        self.products = Products(library)

    def norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """The norm of x [rows, dim]; with a residual, of their sum, which replaces the residual."""
        x = x.contiguous()
        normed = torch.empty_like(x)
        self._library.chasqui_norm(
            self.type,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            *x.shape,
            normed.data_ptr(),
            torch.get_num_threads(),
        )
        return normed

    def rotate(self, heads: torch.Tensor, angles: torch.Tensor) -> None:
        """Rotates heads [rows, heads, head_dim] by complex64 angles [rows, head_dim / 2]."""
        self._library.chasqui_rotate(
            self.type,
            heads.data_ptr(),
            heads.stride(0),
            *heads.shape,
            angles.data_ptr(),
            torch.get_num_threads(),
        )

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """silu(first half) x second half of x [rows, 2 x hidden]."""
        x = x.contiguous()
        rows, hidden = x.shape[0], x.shape[1] // 2
        gated = x.new_empty(rows, hidden)
        self._library.chasqui_gate(
            self.type, x.data_ptr(), rows, hidden, gated.data_ptr(), torch.get_num_threads()
        )
        return gated

    def attend(
        self,
        cache: AttentionCache,
        spans: "ctypes.Array[AttentionSpan]",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Writes a step's keys and values to the cache, then attends the queries over it.

        Query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim].
        """
        attended = query.new_empty(query.shape)
        self._library.chasqui_attend(
            self.type,
            ctypes.byref(cache),
            spans,
            len(spans),
            query.shape[1],
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            attended.data_ptr(),
            torch.get_num_threads(),
        )
        return attended

    def run_layers(
        self, network: ctypes.Structure, step: ctypes.Structure, begin: int, end: int
    ) -> None:
        """Computes halves of layers, as source/layers.cpp has it; `layers.py` calls it."""
        self._library.chasqui_layers(ctypes.byref(network), ctypes.byref(step), begin, end)

    def run_step(
        self,
        network: ctypes.Structure,
        step: ctypes.Structure,
        halves: int,
        ends: ctypes.Structure,
        batch: ctypes.Structure,
    ) -> None:
        """Computes a step of the whole network, as source/layers.cpp has it, for `layers.py`."""
        references = map(ctypes.byref, (ends, batch))
        self._library.chasqui_step(ctypes.byref(network), ctypes.byref(step), halves, *references)


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for the instructions of this process, if they compute in `dtype` on `device`."""
    if device.type != "cpu" or dtype not in ELEMENT_TYPES:
        return None
    library = find_library()
    return None if isinstance(library, str) else _kernels(library, dtype)


def without_kernels() -> str:
    """Why `kernels_for` finds no kernels for the CPU; empty when it does."""
    library = find_library()
    return library if isinstance(library, str) else ""


@functools.cache
def _kernels(library: ctypes.CDLL, dtype: torch.dtype) -> Kernels:
    return Kernels(library, dtype)
