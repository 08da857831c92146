"""Random networks of transformers, saved by it, and its answers with them."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPTS = [[1, 5, 9, 77, 3], [(7 * i + i * i) % 128 for i in range(60)]]
LENGTH = 16
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # far apart logits, so that rounding does not change the best token
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """The differences of a checkpoint: settings, class of the network, size of the largest file."""

    settings: dict[str, Any] = field(default_factory=dict)
    family: str = "Llama"
    file_size: str = "1GB"


VARIANTS = {
    "mha": Variant({"num_key_value_heads": 8}),
    "gqa": Variant(),
    "tied": Variant({"tie_word_embeddings": True}),
    "theta": Variant({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "linear": Variant({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": Variant({"rope_parameters": LLAMA_3}),
    "wide-heads": Variant({"head_dim": 32}),
    "narrow-heads": Variant({"head_dim": 8}),
    "files": Variant(file_size="100KB"),
    "mistral": Variant({"sliding_window": None}, family="Mistral"),
}


def save_model(
    folder: Path, variant: Variant, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The network, saved in `folder`."""
    import transformers  # noqa: PLC0415  # takes seconds, and only these tests need it

    config = getattr(transformers, f"{variant.family}Config")(**(SIZES | variant.settings))
    torch.manual_seed(7)
    model = getattr(transformers, f"{variant.family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():  # norms of ones would not tell one from another
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=variant.file_size)
    assert isinstance(model, torch.nn.Module)
    return model


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompts: list[list[int]], length: int) -> list[dict[str, Any]]:
    """Ids and logprobs of transformers' greedy answers, without its cache."""
    answers = []
    for prompt in prompts:
        ids, logprobs = [*prompt], []
        for _ in range(length):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            ids.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        answers.append({"ids": ids[len(prompt) :], "logprobs": logprobs})
    return answers


def check_greedy_answers(models: dict[str, Any], shards: int) -> None:
    """Compares our answers on this number of shards with those of transformers, by paths."""
    script = str(Path(__file__).with_name("greedy_ranks.py"))
    command = [sys.executable, "-m", "model_service.launcher", f"--shards={shards}", script]
    command += [json.dumps(PROMPTS), str(LENGTH), *models]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    made = json.loads(done.stdout)
    for path, expected in models.items():
        for own, theirs in zip(made[path], expected, strict=True):
            assert own["ids"] == theirs["ids"], path
            assert own["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4), path
