"""Meta's format, to be written: `params.json`, and the tensors of each `consolidated.*.pth`."""

import dataclasses
import itertools
from typing import Any

from model_service.model.config import LLAMA_3_SCALING, ROPE_THETA, ModelConfig
from model_service.model.weights.files.meta_params import metas_context

# Values of `multiple_of` and `ffn_dim_multiplier` in Meta's own files, the default first.
_MULTIPLES = (256, 1024, 4096, 32)
_MULTIPLIERS = (None, 1.3, 1.5, 1.0)


def meta_file_names(count: int) -> list[str]:
    """The names of `count` files of weights."""
    return [f"consolidated.{number:02d}.pth" for number in range(count)]


def meta_order(config: ModelConfig) -> list[str]:
    """The names of the parameters in the order of Meta's files: torch.save keeps it."""
    ends = ["tok_embeddings.weight", "norm.weight", "output.weight"]
    parts = (
        *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        *("attention_norm", "ffn_norm"),
    )
    layers = range(config.n_layers)
    return ends + [f"layers.{layer}.{part}.weight" for layer in layers for part in parts]


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """The content of the `params.json` that describes `config`, in words of Meta's where it has
    some.
    """
    multiple_of, multiplier = _feed_forward(config)
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
    }
    if config.kv_heads != config.n_heads:
        params["n_kv_heads"] = config.kv_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != ROPE_THETA:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling == LLAMA_3_SCALING:
        params["use_scaled_rope"] = True
    elif config.rope_scaling is not None:
        params["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    # Meta's own code knows no such setting, so it is left out where it goes without saying.
    if config.trained_context_length != metas_context(params):
        params["trained_context_length"] = config.trained_context_length
    return params


def _feed_forward(config: ModelConfig) -> tuple[int, float | None]:
    """Values of `multiple_of` and `ffn_dim_multiplier` that make the width of the network."""
    own = (config.multiple_of, config.ffn_dim_multiplier)
    for multiple_of, multiplier in (own, *itertools.product(_MULTIPLES, _MULTIPLIERS)):
        if _hidden_dim(config, multiple_of, multiplier) == config.hidden_dim:
            return multiple_of, multiplier
    # Any width is its own smallest multiple, and the number that is rounded up to it is at most the
    # width; the half keeps rounding of the quotient from making it less.
    return config.hidden_dim, min(1.0, (config.hidden_dim + 0.5) / int(8 * config.dim / 3))


def _hidden_dim(config: ModelConfig, multiple_of: int, multiplier: float | None) -> int:
    derived = dataclasses.replace(
        config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier, hidden_dim=0
    )
    return derived.hidden_dim
