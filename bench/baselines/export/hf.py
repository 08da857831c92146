"""A checkpoint in Hugging Face's format: config.json and model.safetensors, in bfloat16.

`python -m bench.baselines.export.hf CHECKPOINT FOLDER`; needs the extra `bench`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.baselines.export.layout import hf_name, hf_weight
from model_service.model.config import ROPE_THETA, ModelConfig
from model_service.model.weights.checkpoint import open_checkpoint

CONTEXT_LENGTH = 4096


def hf_config(config: ModelConfig) -> dict[str, object]:
    """What config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def export_hf(ckpt_dir: Path, folder: Path) -> None:
    """Writes the checkpoint into an existing folder."""
    checkpoint = open_checkpoint(ckpt_dir, verify=False)
    config = checkpoint.config
    weights = {
        hf_name(name): hf_weight(name, weight, config)
        for name, weight in checkpoint.read_shard(0, 1, torch.bfloat16, torch.device("cpu"))
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.dumps(hf_config(config), indent=2)
    (folder / "config.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    export_hf(Path(sys.argv[1]), Path(sys.argv[2]))
