"""Hugging Face's format, to be written: names, `config.json`, the division into files, the index.

Meta rotates neighbouring features of a head, Hugging Face feature i with i + head_dim / 2: so the
rows of wq and wk change places.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model_service.model.config import ModelConfig, RopeScaling

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9  # transformers' limit of a file
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file of weights to write, and the parameters that it holds, by Meta's names."""

    name: str
    parameters: tuple[str, ...]


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of Meta's parameter `name`."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{_NAMES[stem]}.weight"
    _, number, rest = stem.split(".", 2)
    return f"model.layers.{number}.{_LAYER_NAMES[rest]}.weight"


def hugging_face_weight(name: str, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The weight [rows, …] of Meta's parameter `name`, its rows in Hugging Face's order."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def stored_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are written, by Meta's names: a tied output is not."""
    shapes = config.parameter_shapes()
    if config.tied_embeddings:
        del shapes["output.weight"]
    return shapes


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], itemsizes: Mapping[str, int], files: int | None
) -> list[FilePlan]:
    """The division of the parameters into files, in their order.

    Args:
        shapes: of the parameters.
        itemsizes: bytes of a number of each.
        files: how many; None makes files of up to MAX_FILE_BYTES.
    """
    sizes = {name: math.prod(shape) * itemsizes[name] for name, shape in shapes.items()}
    limit = MAX_FILE_BYTES if files is None else -(-sum(sizes.values()) // files)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit and (files is None or len(groups) < files):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [FilePlan(SINGLE, tuple(groups[0]))]
    return [
        FilePlan(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def index_of(plans: Sequence[FilePlan], total_size: int) -> dict[str, Any]:
    """The content of the index of several files."""
    places = {hugging_face_name(name): plan.name for plan in plans for name in plan.parameters}
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(places.items()))}


def hugging_face_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of the `config.json` that describes `config`, with the weights' type."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.trained_context_length or 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }
