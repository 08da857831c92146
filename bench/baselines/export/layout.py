"""Where Meta's, Hugging Face's and GGUF's layouts differ: names, and the order of rotary features.

Meta rotates neighbouring features (0 with 1, 2 with 3); Hugging Face rotates feature i with
i + head_dim / 2, so the rows of wq and wk move. GGUF's `llama` architecture rotates neighbours as
Meta does: its rows stay.
"""

import torch

from model_service.model.config import ModelConfig

_HF_LAYER = {
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
_HF_TOP = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_GGUF_LAYER = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
_GGUF_TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}


def hf_name(name: str) -> str:
    """Hugging Face's name of one of Meta's parameters."""
    return _renamed(name, "model.layers", _HF_LAYER, _HF_TOP)


def gguf_name(name: str) -> str:
    """GGUF's name of one of Meta's parameters."""
    return _renamed(name, "blk", _GGUF_LAYER, _GGUF_TOP)


def _renamed(name: str, layers: str, in_layer: dict[str, str], top: dict[str, str]) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{top[stem]}.weight"
    _, number, rest = stem.split(".", 2)
    return f"{layers}.{number}.{in_layer[rest]}.weight"


def hf_weight(name: str, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """One of Meta's parameters as Hugging Face's network wants it, contiguous."""
    heads = {"wq": config.n_heads, "wk": config.kv_heads}.get(name.split(".")[-2])
    return weight.contiguous() if heads is None else halves_from_pairs(weight, heads)


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Moves the rows of wq or wk [heads × head_dim, dim] from neighbouring pairs to two halves.

    `permute` in transformers' convert_llama_weights_to_hf.py.
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes `halves_from_pairs`."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
