"""The instructions that the CPU's kernels use in this process.

The processor's flags do not tell, because an environment variable can hold each library to older
instructions (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, FBGEMM_ENABLE_INSTRUCTIONS). So this module
asks the kernels, and tries out those that do not tell. No other module does.
"""

import functools
import os
import warnings

import torch

_WITHOUT_BFLOAT16 = {"AVX512_CORE", "AVX512_CORE_VNNI"}


def instructions() -> str:
    """The instructions, such as `avx512 vnni bf16 amx`. Equal ones round alike, others do not."""
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    extensions = {
        "vnni": adds_products_exactly(),
        "bf16": computes_in_bfloat16(),
        "amx": _uses_tiles(),
    }
    return " ".join([vectors, *(name for name, used in extensions.items() if used)])


@functools.cache
def computes_in_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; without them it is slower than float32."""
    # oneDNN's kernels for older instructions emulate those of bfloat16.
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _WITHOUT_BFLOAT16
    there = torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001
    return allowed and there and has_packed_kernels(torch.bfloat16)


@functools.cache
def has_packed_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of this dtype for this CPU; bfloat16 needs AVX-512 or newer."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(64, 64, dtype=dtype))  # noqa: SLF001
    except RuntimeError:
        return False
    return True


@functools.cache
def adds_products_exactly() -> bool:
    """Whether the 8-bit kernel adds products in 32 bits, as with VNNI instructions.

    Without them it adds pairs of products in 16 bits, where two large ones overflow.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated; we pin
        weight = torch.quantize_per_tensor(torch.full((64, 64), 127.0), 1.0, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
    linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    largest = torch.full((1, 64), 255.0)
    return bool((linear(largest, 1.0, 0, packed) == 64 * 127 * 255).all())


def _uses_tiles() -> bool:
    """Whether oneDNN multiplies bfloat16 with AMX, whose sums are rounded in another order."""
    # PyTorch has no function for the limit that oneDNN was given.
    allowed = "AMX" in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper()
    return allowed and computes_in_bfloat16() and torch.cpu._is_amx_tile_supported()  # noqa: SLF001
