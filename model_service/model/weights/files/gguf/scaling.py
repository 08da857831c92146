"""The scaling of the rotary frequencies that a GGUF file states."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from llama.gguf_header import TensorEntry
from model_service.model.config import ModelConfig, RopeScaling, broken_rule
from model_service.model.errors import CheckpointError, shown_shape
from model_service.model.weights.files.gguf.header import CONVERT_AGAIN, tensor_bytes, type_name

DIVISORS = "rope_freqs.weight"
# llama.cpp stores Llama 3's scaling as one divisor for each frequency. Meta and all its models use
# these settings beside the factor.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}


def linear_scaling(path: Path, stated: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling by one factor for all frequencies; None if there is none."""
    kind, factor = stated.get("rope.scaling.type"), stated.get("rope.scaling.factor")
    if kind is None and "rope.scale_linear" in stated:  # the key of old files
        kind, factor = "linear", stated["rope.scale_linear"]
    if kind in (None, "none") or (kind == "linear" and factor in (0, 1)):
        return None
    if kind != "linear":
        raise CheckpointError(
            path,
            f"scales the rotary frequencies by {kind!r} (llama.rope.scaling.type); none, linear "
            "and the scaling of Llama 3 are known",
            "use the model without this extension of its context",
        )
    try:
        return RopeScaling.checked({"kind": "linear", "factor": factor})
    except ValueError as error:
        raise CheckpointError(path, f"llama.rope.scaling {error}", CONVERT_AGAIN) from None


def divisors_scaling(
    path: Path, entry: TensorEntry | None, data: NDArray[np.uint8], config: ModelConfig
) -> RopeScaling | None:
    """The scaling that the tensor `DIVISORS` [head_dim / 2] states; None if there is none.

    Raises:
        CheckpointError: it is not the scaling of Llama 3.
    """
    if entry is None:
        return None
    if entry.type_number != GGMLQuantizationType.F32 or entry.shape != (config.head_dim // 2,):
        raise CheckpointError(
            path,
            f"{DIVISORS} is {shown_shape(entry.shape)} in "
            f"{type_name(entry.type_number)}, not {config.head_dim // 2} in F32",
            CONVERT_AGAIN,
        )
    numbers = tensor_bytes(path, DIVISORS, entry, data).view("<f4").astype(np.float64)
    if bool((numbers == 1).all()):
        return None
    factor = float(f"{numbers.max().item():.6g}")
    if rule := broken_rule("factor", factor):
        raise CheckpointError(
            path, f"{DIVISORS} has the factor {factor:g}, not {rule}", CONVERT_AGAIN
        )
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = _LLAMA_3["original_context_length"] / (2 * math.pi * config.rope_theta**exponents)
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if config.rope_scaling or not np.allclose(numbers, expected, rtol=1e-4, atol=0.0):
        raise CheckpointError(
            path,
            f"{DIVISORS} changes the rotary frequencies in another way than Llama 3 does, "
            "which divides low ones by a factor and keeps high ones",
            "use a model with Llama 3's scaling of the rotary frequencies, or without any",
        )
    return RopeScaling.checked({"kind": "llama3", "factor": factor, **_LLAMA_3})
