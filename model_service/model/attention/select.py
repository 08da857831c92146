"""The choice of a rank's attention backend, made once when it loads."""

import importlib.util
import logging

import torch

from model_service.model.attention.backend import CachedAttention, CacheShape
from model_service.model.attention.fixed_tiles import FixedTileAttention
from model_service.model.attention.flashinfer_kernels import (
    KernelTypes,
    compile_kernels,
    decodes_on_tensor_cores,
    require_c_compiler,
)
from model_service.model.attention.sdpa import SdpaAttention
from model_service.model.cpu.kernels import kernels_for, without_kernels

_log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # for which FlashInfer has kernels
_MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 and asynchronous copies


def make_attention(
    shape: CacheShape,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype,
    *,
    heads: int,
    max_batch_size: int,
    batch_invariant: bool = False,
) -> CachedAttention:
    """The fastest backend for these arguments, with its cache allocated.

    Args:
        shape: of this rank's cache.
        dtype: of queries, keys and values as the network makes them.
        device: of this rank.
        kv_dtype: of keys and values in the cache: `dtype`, or torch.float8_e4m3fn.
        heads: query heads of this rank.
        max_batch_size: most sequences that run at once.
        batch_invariant: whether the kernels of `model/cuda/` compute the network.
    """
    if batch_invariant:
        from model_service.model.attention.split_attention import (  # noqa: PLC0415  # needs Triton
            SplitAttention,
        )

        _log.info("attention: splits of the context, batch-invariant (the kernels of this package)")
        return SplitAttention(shape, device, kv_dtype, heads=heads)
    if kernels := kernels_for(dtype, device):
        _log.info("attention: fixed tiles of the context (the kernels of this package)")
        return FixedTileAttention(kernels, shape, kv_dtype)
    if reason := _without_flashinfer(dtype, device, shape.head_dim):
        _log.info("attention: PyTorch's scaled_dot_product_attention (%s)", reason)
        return SdpaAttention(shape, dtype, device, kv_dtype)
    prepare_attention(shape, dtype, device, kv_dtype, heads=heads)
    from model_service.model.attention.flashinfer import (  # noqa: PLC0415  # an optional extra
        FlashInferAttention,
    )

    _log.info("attention: FlashInfer")
    return FlashInferAttention(
        shape, dtype, device, kv_dtype, heads=heads, max_batch_size=max_batch_size
    )


def prepare_attention(
    shape: CacheShape,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype,
    *,
    heads: int,
    batch_invariant: bool = False,
) -> None:
    """Compiles what `make_attention` and the operations need and is not compiled yet.

    Raises:
        StartError: this machine cannot compile it.
    """
    if batch_invariant:
        require_c_compiler()  # Triton compiles at the first steps
    elif can_use_flashinfer(dtype, device, shape.head_dim):
        require_c_compiler()
        on_tensor_cores = decodes_on_tensor_cores(heads, shape.kv_heads)
        types = KernelTypes(dtype, kv_dtype, shape.head_dim, on_tensor_cores)
        compile_kernels(types, torch.cuda.get_device_capability(device))


def can_use_flashinfer(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether FlashInfer is installed and computes in `dtype` on `device`."""
    return not _without_flashinfer(dtype, device, head_dim)


def _without_flashinfer(dtype: torch.dtype, device: torch.device, head_dim: int) -> str:
    """Why FlashInfer cannot compute this; empty when it can."""
    if device.type != "cuda":
        return f"on the CPU, without this package's kernels: {without_kernels()}"
    if dtype not in {torch.float16, torch.bfloat16}:
        return f"FlashInfer has no kernels for {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer has no kernels for heads of {head_dim}"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "FlashInfer needs compute capability 8.0"
    for package in ("flashinfer", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install '.[cuda]' in the source tree"
    return ""
