"""The network's shape from the metadata of a GGUF file of the architecture llama.

The keys are those that llama.cpp writes: gguf/constants.py of the gguf package.
"""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_service.model.config import ModelConfig, RopeScaling, broken_rule
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.header import CONVERT_AGAIN, SkippedArray, Value

ARCHITECTURE = "llama"
_REQUIRED = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "hidden_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "context_length": "trained_context_length",
}
_OPTIONAL = {
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# Keys that change nothing, or only with values that are refused below.
_OTHERS = {
    "attention.causal",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
}
# llama.cpp stores Llama 3's scaling as one divisor for each frequency. Meta and all its models use
# these settings beside the factor.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}


def check_kind(path: Path, metadata: Mapping[str, Value]) -> None:
    """Raises CheckpointError unless the file holds a whole model of the architecture llama."""
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            path,
            f"is one of the {parts} files of a split model",
            f"merge them: llama-gguf-split --merge {path.name} merged.gguf (the first file and a "
            "new name), then name the new file",
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            path, f"holds the type {kind!r}, not a model", "name the GGUF file of a model"
        )
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            path,
            f"holds a model of the architecture {architecture!r}; only {ARCHITECTURE!r} is served",
            "use a Llama, or a model with its architecture, such as TinyLlama or SmolLM2",
        )


def read_config(
    path: Path, metadata: Mapping[str, Value], *, vocab_size: int, tied: bool
) -> ModelConfig:
    """The shape that the metadata states, without a scaling that is stored as a tensor.

    Args:
        path: of the file, for messages.
        metadata: of the file.
        vocab_size: rows of the embedding.
        tied: whether the file has no output matrix of its own.

    Raises:
        CheckpointError: a key is missing, unknown or out of range, or asks for more than Llama.
    """
    prefix = f"{ARCHITECTURE}."
    stated = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    _check_keys(path, stated)
    fields = _fields(path, stated)
    if fields.setdefault("vocab_size", vocab_size) != vocab_size:
        raise CheckpointError(
            path,
            f"states llama.vocab_size {fields['vocab_size']}, and token_embd.weight has "
            f"{vocab_size} rows",
            CONVERT_AGAIN,
        )
    config = ModelConfig(
        **fields,  # type: ignore[arg-type]  # each value was checked
        tied_embeddings=tied,
        rope_scaling=_linear_scaling(path, stated),
    )
    _check_heads(path, stated, config)
    return config


def read_divisors(
    path: Path, divisors: NDArray[np.float32], config: ModelConfig
) -> RopeScaling | None:
    """The scaling that divides the rotary frequencies by these numbers [head_dim / 2].

    Raises:
        CheckpointError: it is not the scaling of Llama 3.
    """
    numbers = divisors.astype(np.float64)
    if bool((numbers == 1).all()):
        return None
    factor = float(f"{numbers.max().item():.6g}")
    if rule := broken_rule("factor", factor):
        raise CheckpointError(
            path, f"rope_freqs.weight has the factor {factor:g}, not {rule}", CONVERT_AGAIN
        )
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = _LLAMA_3["original_context_length"] / (2 * math.pi * config.rope_theta**exponents)
    low, high = _LLAMA_3["low_freq_factor"], _LLAMA_3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if config.rope_scaling or not np.allclose(numbers, expected, rtol=1e-4, atol=0.0):
        raise CheckpointError(
            path,
            "rope_freqs.weight changes the rotary frequencies in another way than Llama 3 does, "
            "which divides low ones by a factor and keeps high ones",
            "use a model with Llama 3's scaling of the rotary frequencies, or without any",
        )
    return RopeScaling.checked({"kind": "llama3", "factor": factor, **_LLAMA_3})


def _check_keys(path: Path, stated: Mapping[str, Value]) -> None:
    """Raises CheckpointError for keys that are missing, unknown, or ask for more than Llama."""
    if missing := sorted(_REQUIRED.keys() - stated.keys()):
        raise CheckpointError(path, f"lacks llama.{missing[0]}", CONVERT_AGAIN)
    if unknown := sorted(stated.keys() - _REQUIRED.keys() - _OPTIONAL.keys() - _OTHERS):
        raise CheckpointError(
            path,
            f"has the unknown key llama.{unknown[0]}, which may change the network",
            "use another model; or, if you know that the key changes nothing, remove it with "
            f"gguf-new-metadata --remove-metadata llama.{unknown[0]}, of the gguf package",
        )
    if stated.get("expert_count", 0) != 0:
        raise CheckpointError(
            path,
            f"holds a mixture of {stated['expert_count']} experts (llama.expert_count)",
            "use a dense model",
        )
    if stated.get("attention.causal", True) is not True:
        raise CheckpointError(
            path, "attends to later tokens (llama.attention.causal)", "use a model that generates"
        )


def _fields(path: Path, stated: Mapping[str, Value]) -> dict[str, object]:
    """The fields of ModelConfig that keys state, with their values checked."""
    fields: dict[str, object] = {}
    for key, field in (_REQUIRED | _OPTIONAL).items():
        if key not in stated:
            continue
        value = stated[key]
        if isinstance(value, SkippedArray):
            raise CheckpointError(
                path,
                f"llama.{key} is a list of {value.count} numbers: the layers differ",
                "use a model whose layers are alike",
            )
        if isinstance(value, float):
            # 32 bits: the shortest decimal number is the one that the model's author wrote.
            value = float(str(np.float32(value)))
        if rule := broken_rule(field, value):
            raise CheckpointError(
                path, f"llama.{key} is {reprlib.repr(value)}, not {rule}", CONVERT_AGAIN
            )
        fields[field] = value
    return fields


def _linear_scaling(path: Path, stated: Mapping[str, Value]) -> RopeScaling | None:
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


def _check_heads(path: Path, stated: Mapping[str, Value], config: ModelConfig) -> None:
    """Raises CheckpointError if the sizes of heads contradict each other."""
    if "attention.key_length" not in stated and config.dim % config.n_heads:
        raise CheckpointError(
            path,
            f"llama.embedding_length {config.dim} is no multiple of llama.attention.head_count "
            f"{config.n_heads}",
            CONVERT_AGAIN,
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated.get(key, config.head_dim) != config.head_dim:
            raise CheckpointError(
                path,
                f"llama.{key} is {stated[key]}, and a head has {config.head_dim} features; other "
                "sizes than this are not served",
                "use a model whose values are as wide as its keys and which rotates whole heads",
            )
    if rule := config.uneven_heads():
        raise CheckpointError(path, rule, CONVERT_AGAIN)
