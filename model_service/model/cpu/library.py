"""The C library that is compiled from `source/` when this package is installed.

Without a compiler there is none, and PyTorch's kernels serve.
"""

import ctypes
import enum
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from model_service.model.cpu.instructions import instructions
from model_service.model.cpu.module import MODULE

# `chasqui_interface` in source/interface.cpp. Raised with every change of a function's arguments or
# results, because it belongs to a replica's fingerprint.
INTERFACE = 5

# The types of each function's arguments, by its name.
Signatures = Mapping[str, Sequence[Any]]


class InstructionSet(enum.IntEnum):
    """For which of the compiled variants, as `chasqui_use` numbers them."""

    AVX2 = 0
    AVX512_VNNI = 1
    AVX512_BF16 = 2
    AMX = 3


def declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    """Declares functions that return nothing, so that calls convert and check their arguments."""
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None


@functools.cache
def find_library() -> ctypes.CDLL | str:
    """The library for the instructions of this process, or why there is none."""
    variant = _instruction_set(instructions())
    if variant is None:
        return "the processor has no AVX2"
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        return "they were not compiled: install a C++ compiler, then this package again"
    try:
        # Its undefined symbols are those of the OpenMP runtime that PyTorch has loaded.
        library = ctypes.CDLL(found.origin)
        compiled_from = library.chasqui_interface()
    except (OSError, AttributeError) as error:
        return f"{found.origin} cannot be loaded ({error}): install this package again"
    if compiled_from != INTERFACE:
        return f"{found.origin} is of another version: install this package again"
    if library.chasqui_use(variant):
        return "the system does not allow AMX: set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
    return library


def _instruction_set(used: str) -> InstructionSet | None:
    """The variant for `instructions`, so that the same variables hold all kernels to older ones."""
    vectors, *extensions = used.split()
    if vectors not in {"avx2", "avx512"}:
        return None
    if vectors == "avx2" or "vnni" not in extensions:
        return InstructionSet.AVX2
    if "amx" in extensions:
        return InstructionSet.AMX
    return InstructionSet.AVX512_BF16 if "bf16" in extensions else InstructionSet.AVX512_VNNI
