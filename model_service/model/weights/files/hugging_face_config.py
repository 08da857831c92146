"""Reads the `config.json` of a Hugging Face folder, if it describes a network of Llama's kind.

Settings have the names and defaults of `LlamaConfig` and `MistralConfig` in transformers. A setting
that would change the arithmetic to one that this engine does not have is refused.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_service.model.config import ROPE_THETA, ModelConfig, RopeScaling, broken_rule
from model_service.model.errors import CheckpointError
from model_service.model.weights.files.json_file import read_json_object

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# Transformers' window where a Mistral's config.json states none.
_MISTRAL_WINDOW = 4096
# The settings that are sizes of the network, and the names of the same in ModelConfig.
_REQUIRED = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "trained_context_length",
}
_OPTIONAL = {"num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}
_LLAMA_ONLY = "serve a checkpoint with Llama's architecture"
_REPR = reprlib.Repr()
_REPR.maxstring = 80  # the names of classes are long


def read_config(path: Path) -> ModelConfig:
    """The configuration in a `config.json`.

    Raises:
        CheckpointError: the file is missing, is not JSON, or does not describe a network that this
            engine computes.
    """
    settings = read_json_object(path, if_missing="download it, too")
    _check_architecture(path, settings)
    _check_arithmetic(path, settings)
    sizes = _sizes(path, settings)
    theta, scaling = _rope(path, settings)
    config = ModelConfig(
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=_flag(path, settings, "tie_word_embeddings"),
        **sizes,
    )
    if "head_dim" not in sizes and config.dim % config.n_heads:
        raise CheckpointError(
            path,
            f"states no head_dim, and hidden_size {config.dim} is no multiple of "
            f"num_attention_heads {config.n_heads}",
            "copy it again",
        )
    if rule := config.uneven_heads():
        rule = rule.replace("n_kv_heads", "num_key_value_heads")
        raise CheckpointError(path, rule.replace("n_heads", "num_attention_heads"), "copy it again")
    return config


def _check_architecture(path: Path, settings: Mapping[str, Any]) -> None:
    supported = " and ".join(_ARCHITECTURES.values())
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise CheckpointError(
            path,
            f"has model_type {_shown(model_type)}; {supported} are supported",
            _LLAMA_ONLY,
        )
    expected = _ARCHITECTURES[model_type]
    architectures = settings.get("architectures")
    if architectures is not None and architectures != [expected]:
        raise CheckpointError(
            path,
            f"has architectures {_shown(architectures)}; {supported} are supported",
            _LLAMA_ONLY,
        )
    window = settings.get("sliding_window", _MISTRAL_WINDOW) if model_type == "mistral" else None
    if window is not None:
        raise CheckpointError(
            path,
            f"has sliding_window {_shown(window)}, but here every token attends to all before it",
            "serve a checkpoint whose sliding_window is null, such as Mistral 7B v0.2 and later",
        )


def _check_arithmetic(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError for settings that ask for another network than Llama's."""
    if quantization := settings.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            path,
            f"has a quantization_config ({method or 'of an unknown method'}), but weights in "
            "float32, bfloat16 or float16 are supported",
            "serve the original checkpoint; --quantize quantizes it when it is loaded",
        )
    for name in ("attention_bias", "mlp_bias"):
        if _flag(path, settings, name):
            raise CheckpointError(
                path, f"has {name} true, but linear layers have no bias here", _LLAMA_ONLY
            )
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(
            path,
            f"has hidden_act {_shown(activation)}; silu is supported",
            _LLAMA_ONLY,
        )


def _sizes(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes by their names in ModelConfig."""
    sizes: dict[str, Any] = {}
    for name, own in (_REQUIRED | _OPTIONAL).items():
        value = settings.get(name)
        if value is None and name in _OPTIONAL:
            continue
        if value is None:
            raise CheckpointError(path, f"lacks {name}", "copy it again")
        # -1 is Meta's way to leave the size of the vocabulary open.
        if rule := broken_rule("n_layers" if own == "vocab_size" else own, value):
            raise CheckpointError(path, f"{name} is {_shown(value)}, not {rule}", "correct it")
        sizes[own] = value
    return sizes


def _flag(path: Path, settings: Mapping[str, Any], name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(path, f"{name} is {_shown(value)}, not true or false", "correct it")
    return value


def _rope(path: Path, settings: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies.

    Both are in `rope_parameters` since transformers 5, and before in `rope_theta` and
    `rope_scaling`.
    """
    name = "rope_scaling" if settings.get("rope_parameters") is None else "rope_parameters"
    stated = settings.get(name)
    if stated is None:
        stated = {}
    if not isinstance(stated, dict):
        raise CheckpointError(path, f"{name} is {_shown(stated)}, not an object", "correct it")
    theta = stated.get("rope_theta", settings.get("rope_theta", ROPE_THETA))
    if rule := broken_rule("rope_theta", theta):
        raise CheckpointError(path, f"rope_theta is {_shown(theta)}, not {rule}", "correct it")
    share = stated.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise CheckpointError(
            path,
            f"has partial_rotary_factor {_shown(share)}, but all features of a head rotate here",
            _LLAMA_ONLY,
        )
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return float(theta), None
    return float(theta), _scaling(path, name, kind, stated, settings)


def _scaling(
    path: Path, name: str, kind: object, stated: Mapping[str, Any], settings: Mapping[str, Any]
) -> RopeScaling:
    if not isinstance(kind, str) or kind not in {"linear", "llama3"}:
        raise CheckpointError(
            path,
            f"has {name} of the type {_shown(kind)}; default, linear and llama3 are supported",
            _LLAMA_ONLY,
        )
    fields: dict[str, object] = {"kind": kind}
    if kind == "llama3":
        stated = {
            "original_max_position_embeddings": settings["max_position_embeddings"],
            **stated,
        }
        fields |= {
            own: stated[theirs]
            for own, theirs in {
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_context_length": "original_max_position_embeddings",
            }.items()
            if theirs in stated
        }
    if "factor" in stated:
        fields["factor"] = stated["factor"]
    try:
        return RopeScaling.checked(fields)
    except ValueError as error:
        problem = str(error).replace("original_context_length", "original_max_position_embeddings")
        raise CheckpointError(path, f"{name} {problem}", "correct it") from None


def _shown(value: object) -> str:
    return _REPR.repr(value)
