"""The bfloat16 kernels that are compiled when this package is installed (`source/`).

Each computes a row of its input in one order of operations, whatever the number of rows and threads
is. So a token's logits do not depend on the other tokens of its step, unlike with the kernels of
PyTorch, which choose an order for each shape.

`load` finds the library; without a compiler there is none, and PyTorch's kernels serve.
"""

import ctypes
import enum
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from model_service.model.cpu.instructions import instructions

_INTERFACE = 1  # `chasqui_interface` in source/interface.cpp
_MODULE = "model_service.model.cpu._kernels"

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_void_p


class InstructionSet(enum.IntEnum):
    """For which of the compiled variants, as `chasqui_use` numbers them."""

    AVX2 = 0
    AVX512_BF16 = 1
    AMX = 2


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


_ARGUMENTS: dict[str, Sequence[Any]] = {
    "chasqui_packed_size": (_INT, _INT),
    "chasqui_pack": (_POINTER, _INT, _INT, _POINTER, _INT),
    "chasqui_multiply": (_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _INT),
    "chasqui_norm": (_POINTER, _POINTER, _POINTER, ctypes.c_float, _INT, _INT, _POINTER, _INT),
    "chasqui_rotate": (_POINTER, _LONG, _INT, _INT, _INT, _POINTER, _INT),
    "chasqui_gate": (_POINTER, _INT, _INT, _POINTER, _INT),
    "chasqui_write": (_POINTER, _POINTER, _INT, _POINTER, _LONG, _POINTER, _LONG, _INT),
    "chasqui_attend": (_POINTER, _POINTER, _INT, _POINTER, _LONG, _INT, _POINTER, _INT),
}


class Kernels:
    """The library's functions on tensors; all in bfloat16 unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.chasqui_packed_size.restype = _LONG
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
    loaded = _loaded()
    return loaded if isinstance(loaded, Kernels) else None


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels, if they are there and compute in `dtype` on `device`."""
    return load() if dtype == torch.bfloat16 and device.type == "cpu" else None


def without_kernels() -> str:
    """Why `load` finds no kernels; empty when it does."""
    loaded = _loaded()
    return "" if isinstance(loaded, Kernels) else loaded


@functools.cache
def _loaded() -> Kernels | str:
    """The kernels, or why there are none."""
    variant = _instruction_set(instructions())
    if variant is None:
        return "the processor has no AVX2"
    found = importlib.util.find_spec(_MODULE)
    if found is None or found.origin is None:
        return "they were not compiled: install a C++ compiler, then this package again"
    try:
        # Its undefined symbols are those of the OpenMP runtime that PyTorch has loaded.
        library = ctypes.CDLL(found.origin)
        compiled_from = library.chasqui_interface()
    except (OSError, AttributeError) as error:
        return f"{found.origin} cannot be loaded ({error}): install this package again"
    if compiled_from != _INTERFACE:
        return f"{found.origin} is of another version: install this package again"
    if library.chasqui_use(variant):
        return "the system does not allow AMX: set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
    return Kernels(library)


def _instruction_set(used: str) -> InstructionSet | None:
    """The variant for `instructions`, so that the same variables hold all kernels to older ones."""
    vectors, *extensions = used.split()
    if "amx" in extensions:
        return InstructionSet.AMX
    if "bf16" in extensions:
        return InstructionSet.AVX512_BF16
    return InstructionSet.AVX2 if vectors in {"avx2", "avx512"} else None
