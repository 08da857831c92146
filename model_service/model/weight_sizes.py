"""The memory that a weight of a linear layer takes in each form. Imports no PyTorch."""

import importlib.util

from model_service.model.config import Quantization
from model_service.model.cpu.module import MODULE

GROUP_SIZE = 64  # neighbours in a row whose 4-bit codes share one scale


def weight_bytes(quantization: Quantization, itemsize: int, device_type: str) -> float:
    """Bytes per weight, including its share of the groups' scales.

    Args:
        quantization: the form of the weights.
        itemsize: bytes of one number of the activations' type.
        device_type: cpu or cuda.
    """
    if quantization == "none":
        return itemsize
    if device_type == "cuda":
        return {"int8": 1.0, "int4": 0.5 + 4 / GROUP_SIZE, "fp8": 1.0}[quantization]
    compiled = importlib.util.find_spec(MODULE) is not None
    # PyTorch has no kernel for int4 that would give the same result for any number of rows.
    int4 = 0.5 + 4 / GROUP_SIZE if compiled else 1.0
    return {"int8": 1.0, "int4": int4, "fp8": 4.0}[quantization]
