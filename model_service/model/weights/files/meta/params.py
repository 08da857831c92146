"""Reads Meta's `params.json`."""

import dataclasses
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_service.model.config import (
    LLAMA_3_SCALING,
    ROPE_THETA,
    ModelConfig,
    RopeScaling,
    broken_rule,
)
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.json_file import read_json_object

# Context lengths for which Meta trained its models; params.json does not state them.
_LLAMA_2_CONTEXT, _LLAMA_3_CONTEXT, _SCALED_CONTEXT = 4096, 8192, 131072
# The file of Llama 3 says `use_scaled_rope`; converted checkpoints say which scaling.
_SCALING_PARAMS = {"rope_scaling", "use_scaled_rope"}
_PARAMS = {field.name for field in dataclasses.fields(ModelConfig)} | {"use_scaled_rope"}
_ALWAYS = {"dim", "n_layers", "n_heads"}
_PARAMS -= {"tied_embeddings"}  # Meta's files hold the output matrix in any case


def read_params(path: Path) -> ModelConfig:
    """The configuration in a `params.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, or does not describe a Llama network.
    """
    params = read_json_object(
        path, if_missing="name the folder that holds params.json and consolidated.*.pth"
    )
    return _validated(path, params)


def params_of(config: ModelConfig) -> dict[str, Any]:
    """The content of a params.json for `config`: in Meta's own terms as far as these suffice."""
    defaults = ModelConfig(config.dim, config.n_layers, config.n_heads)
    params: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelConfig)
        if field.name in _ALWAYS or getattr(config, field.name) != getattr(defaults, field.name)
    }
    derived = dataclasses.replace(config, head_dim=0, hidden_dim=0)
    for name in ("head_dim", "hidden_dim"):
        if getattr(config, name) == getattr(derived, name):
            params.pop(name, None)
    params.pop("tied_embeddings", None)
    scaling = params.pop("rope_scaling", None)
    if scaling == LLAMA_3_SCALING:
        params["use_scaled_rope"] = True
    elif scaling is not None:
        params["rope_scaling"] = dataclasses.asdict(scaling)
    if config.trained_context_length == _metas_context(params):
        params.pop("trained_context_length", None)
    return params


def _validated(path: Path, params: Mapping[str, object]) -> ModelConfig:
    unknown = sorted(set(params) - _PARAMS)
    if unknown:
        raise CheckpointError(
            path,
            f"has settings that Llama does not know: {', '.join(unknown)}",
            "serve a Llama checkpoint in Meta's format",
        )
    scaling = _scaling(path, params)
    plain = {name: params[name] for name in params if name not in _SCALING_PARAMS}
    for name, value in plain.items():
        if rule := broken_rule(name, value):
            raise CheckpointError(
                path, f"{name} is {reprlib.repr(value)}, not {rule}", "correct it"
            )
    plain.setdefault("trained_context_length", _metas_context(params))
    config = ModelConfig(rope_scaling=scaling, **plain)  # type: ignore[arg-type]  # checked above
    if ("head_dim" not in params and config.dim % config.n_heads) or config.uneven_heads():
        raise CheckpointError(
            path,
            f"dim {config.dim}, n_heads {config.n_heads} and n_kv_heads {config.kv_heads} do not "
            "divide into heads of even size",
            "copy it again",
        )
    return config


def _scaling(path: Path, params: Mapping[str, object]) -> RopeScaling | None:
    stated, is_scaled = params.get("rope_scaling"), params.get("use_scaled_rope", False)
    if not isinstance(is_scaled, bool):
        shown = reprlib.repr(is_scaled)
        raise CheckpointError(path, f"use_scaled_rope is {shown}, not true or false", "correct it")
    if stated is None:
        return LLAMA_3_SCALING if is_scaled else None
    if not isinstance(stated, dict):
        shown = reprlib.repr(stated)
        raise CheckpointError(path, f"rope_scaling is {shown}, not an object", "correct it")
    try:
        return RopeScaling.checked(stated)
    except ValueError as error:
        raise CheckpointError(path, f"rope_scaling {error}", "correct it") from None


def _metas_context(params: Mapping[str, object]) -> int:
    if params.get("use_scaled_rope"):
        return _SCALED_CONTEXT
    return (
        _LLAMA_2_CONTEXT if params.get("rope_theta", ROPE_THETA) == ROPE_THETA else _LLAMA_3_CONTEXT
    )
