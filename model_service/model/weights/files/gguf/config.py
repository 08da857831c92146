"""The network's shape from the metadata of a GGUF file of the architecture llama.

The keys are those that llama.cpp writes: gguf/constants.py of the gguf package.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama.gguf_header import GgufHeader
from model_service.model.config import ModelConfig, broken_rule
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.gguf.header import CONVERT_AGAIN
from model_service.model.weights.files.gguf.scaling import (
    DIVISORS,
    divisors_scaling,
    linear_scaling,
)

ARCHITECTURE = "llama"
EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
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


def read_config(path: Path, header: GgufHeader, data: NDArray[np.uint8]) -> ModelConfig:
    """The shape of the network in the file at `path`, whose bytes are `data`.

    Raises:
        CheckpointError: the file holds no whole model of the architecture llama; or a key is
            missing, unknown or out of range, or asks for more than Llama.
    """
    metadata = header.metadata
    _check_kind(path, metadata)
    if EMBEDDING not in header.tensors:
        raise CheckpointError(path, f"lacks {EMBEDDING}", CONVERT_AGAIN)
    prefix = f"{ARCHITECTURE}."
    stated = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    _check_keys(path, stated)
    fields = _fields(path, stated)
    rows = header.tensors[EMBEDDING].shape[0]
    if fields.setdefault("vocab_size", rows) != rows:
        raise CheckpointError(
            path,
            f"states llama.vocab_size {fields['vocab_size']}, and {EMBEDDING} has {rows} rows",
            CONVERT_AGAIN,
        )
    config = ModelConfig(
        **fields,  # type: ignore[arg-type]  # each value was checked
        tied_embeddings=_OUTPUT not in header.tensors,
        rope_scaling=linear_scaling(path, stated),
    )
    _check_heads(path, stated, config)
    scaling = divisors_scaling(path, header.tensors.get(DIVISORS), data, config)
    return replace(config, rope_scaling=scaling or config.rope_scaling)


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
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


def _check_keys(path: Path, stated: Mapping[str, Any]) -> None:
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


def _fields(path: Path, stated: Mapping[str, Any]) -> dict[str, object]:
    """The fields of ModelConfig that keys state, with their values checked."""
    fields: dict[str, object] = {}
    for key, field in (_REQUIRED | _OPTIONAL).items():
        if key not in stated:
            continue
        value = stated[key]
        if isinstance(value, list):
            raise CheckpointError(
                path,
                f"llama.{key} is a list of {len(value)} numbers: the layers differ",
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


def _check_heads(path: Path, stated: Mapping[str, Any], config: ModelConfig) -> None:
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
