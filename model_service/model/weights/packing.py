"""The choice of the form of linear layers' weights on a device."""

import torch

from model_service.model.config import ModelConfig, Quantization
from model_service.model.cpu.instructions import has_packed_kernels
from model_service.model.cpu.kernels import kernels_for
from model_service.model.cpu.products import Form
from model_service.model.weights import matrices
from model_service.model.weights.matrices import Pack


def packing(
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_invariant: bool = False,
) -> Pack:
    """The function that packs a weight on `device` for activations of `dtype`.

    Args:
        quantization: the form of the weights.
        dtype: of the activations.
        device: of this rank.
        batch_invariant: whether the kernels of `model/cuda/` compute the network.
    """
    if batch_invariant:
        # Importing Triton takes seconds.
        from model_service.model.weights.invariant import pack_tiles  # noqa: PLC0415

        return pack_tiles(quantization, dtype)
    if quantization != "none" and device.type == "cuda":
        from model_service.model.weights import cuda  # noqa: PLC0415

        pack = cuda.PACK[quantization]
        return lambda weight: pack(weight, dtype)
    if quantization != "none":
        return _quantized_on_cpu(quantization)
    if kernels := kernels_for(dtype, device):
        return matrices.pack_blocks(kernels.products, _FORMS[dtype])
    if device.type == "cpu" and has_packed_kernels(dtype):
        return matrices.prepack
    return plain


def plain(weight: torch.Tensor) -> torch.Tensor:
    return weight


def shares_tied_output(
    config: ModelConfig, shards: int, quantization: Quantization, dtype: torch.dtype, device: str
) -> bool:
    """Whether a tied output matrix is the embedding's tensor, in memory once.

    Several ranks cut the two matrices along different dimensions, and packed kernels read the
    output matrix in an order of their own.
    """
    if not config.tied_embeddings or shards > 1 or quantization != "none":
        return False
    return packing(quantization, dtype, torch.device(device)) is plain


def _quantized_on_cpu(quantization: Quantization) -> Pack:
    kernels = kernels_for(torch.float32, torch.device("cpu"))
    if kernels is None:
        return _IN_PYTORCH[quantization]
    if quantization == "fp8":
        return matrices.pack_fp8(matrices.pack_blocks(kernels.products, Form.FLOAT32))
    return matrices.pack_blocks(kernels.products, _QUANTIZED_FORMS[quantization])


_FORMS = {torch.bfloat16: Form.BFLOAT16, torch.float32: Form.FLOAT32}
_QUANTIZED_FORMS: dict[Quantization, Form] = {"int8": Form.INT8, "int4": Form.INT4}
_IN_PYTORCH: dict[Quantization, Pack] = {
    "int8": matrices.pack_int8,
    "int4": matrices.pack_int4,
    "fp8": matrices.pack_fp8(),
}
