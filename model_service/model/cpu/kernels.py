"""The compiled kernels beside the products: norms, rotary embedding, SwiGLU's gate, attention.

Each computes a row of its input in one order of operations, whatever the number of rows and threads
is. So a token's logits do not depend on the other tokens of its step, unlike with the kernels of
PyTorch, which choose an order for each shape.

`load` finds them; `library.py` says when there are none.
"""

import ctypes
import functools

import torch

from model_service.model.cpu.library import declare, find_library
from model_service.model.cpu.products import Products

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_void_p


class AttentionCache(ctypes.Structure):
    """One layer's keys and values; see source/interface.h."""

    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("widened", _POINTER),
        ("kv_heads", _INT),
        ("head_dim", _INT),
        ("block_size", _INT),
    )


class AttentionSpan(ctypes.Structure):
    """One sequence's part of the flat batch; see source/interface.h."""

    _fields_ = (
        ("table", _POINTER),
        ("row", _INT),
        ("query_length", _INT),
        ("context_length", _INT),
    )


_SIGNATURES = {
    "chasqui_norm": (_POINTER, _POINTER, _POINTER, ctypes.c_float, _INT, _INT, _POINTER, _INT),
    "chasqui_rotate": (_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT),
    "chasqui_gate": (_POINTER, _INT, _INT, _POINTER, _INT),
    "chasqui_write": (_POINTER, _POINTER, _INT, _POINTER, _LONG, _POINTER, _LONG, _INT),
    "chasqui_attend": (_POINTER, _POINTER, _INT, _POINTER, _LONG, _INT, _POINTER, _INT),
}


class Kernels:
    """The library's functions on tensors; all in bfloat16 unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._library = library
        self.products = Products(library)

    def norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """The norm of x [rows, dim]; with a residual, of their sum, which replaces the residual."""
        x = x.contiguous()
        normed = torch.empty_like(x)
        self._library.chasqui_norm(
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
            x.data_ptr(), rows, hidden, gated.data_ptr(), torch.get_num_threads()
        )
        return gated

    def write(
        self,
        cache: AttentionCache,
        spans: "ctypes.Array[AttentionSpan]",
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Writes a step's keys and values [tokens, kv_heads, head_dim], in the cache's dtype."""
        self._library.chasqui_write(
            ctypes.byref(cache),
            spans,
            len(spans),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            key.element_size(),
        )

    def attend(
        self, cache: AttentionCache, spans: "ctypes.Array[AttentionSpan]", query: torch.Tensor
    ) -> torch.Tensor:
        """Attention of query [tokens, heads, head_dim] over the tokens that are in the cache."""
        attended = query.new_empty(query.shape)
        self._library.chasqui_attend(
            ctypes.byref(cache),
            spans,
            len(spans),
            query.data_ptr(),
            query.stride(0),
            query.shape[1],
            attended.data_ptr(),
            torch.get_num_threads(),
        )
        return attended


def load() -> Kernels | None:
    """The kernels for the instructions of this process, or None; `without_kernels` says why."""
    library = find_library()
    return None if isinstance(library, str) else _kernels(library)


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels, if they are there and compute in `dtype` on `device`."""
    return load() if dtype == torch.bfloat16 and device.type == "cpu" else None


def without_kernels() -> str:
    """Why `load` finds no kernels; empty when it does."""
    library = find_library()
    return library if isinstance(library, str) else ""


@functools.cache
def _kernels(library: ctypes.CDLL) -> Kernels:
    return Kernels(library)
