"""GGUF files of small random networks, as llama.cpp's convert_hf_to_gguf.py writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

HEADS, KV_HEADS = 8, 4
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,  # the block of the K types, so that two shards cut blocks
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # far apart logits, so that rounding does not change the best token
}
METADATA: dict[str, Any] = {
    "llama.context_length": 256,
    "llama.embedding_length": 256,
    "llama.block_count": 2,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.dimension_count": 32,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": 128,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"piece{number}" for number in range(128)],
    "tokenizer.ggml.token_type": [1] * 128,
}
# Where the float16 scales of a block lie, by types that the gguf package does not quantize to.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}
QUANTIZED_BY_PACKAGE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
_SCALE = 0.004  # of random blocks: weights are then of the size of those of trained networks

Tensors = dict[str, tuple[NDArray[Any], Any]]


def make_model(**settings: Any) -> torch.nn.Module:
    """A random network of transformers."""
    import transformers  # noqa: PLC0415  # takes 10 s

    torch.manual_seed(7)
    config = transformers.LlamaConfig(**(SIZES | settings))
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # norms of ones would not tell one from another
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def converted(model: torch.nn.Module, type_name: str, *, tied: bool = False) -> Tensors:
    """The network's tensors and their types, by the names of llama.cpp.

    Matrices are in the type; random ones where the gguf package cannot quantize to it.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    tensors: Tensors = {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        values = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _permute(values, HEADS if ".q_proj" in name else KV_HEADS)
        stored = str(names.get_name(name, try_suffixes=(".weight",)))
        tensors[stored] = _stored(values, "F32" if values.ndim == 1 else type_name, number)
    return tensors


def _permute(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def _stored(values: NDArray[Any], type_name: str, seed: int) -> tuple[NDArray[Any], Any]:
    kind = GGMLQuantizationType[type_name]
    if type_name in QUANTIZED_BY_PACKAGE:
        return gguf.quantize(values, kind), kind
    return random_blocks(values.shape, type_name, seed), kind


def random_blocks(shape: tuple[int, ...], type_name: str, seed: int) -> NDArray[np.uint8]:
    """Random weights [rows, bytes per row] of a type with small scales."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = _SCALE if type_name in {"IQ4_NL", "Q2_K", "Q3_K"} else _SCALE / 16
    for begin in SCALES[type_name]:
        blocks[..., begin : begin + 2] = np.array([scale], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, Any] = METADATA,
    *,
    architecture: str = "llama",
    endianess: Any = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Writes a file with these tensors and metadata."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in metadata.items():
        writer.add_key_value(key, value, _value_type(value))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value_type(value: object) -> GGUFValueType:
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[types[type(value)]]


def loaded_by_transformers(path: Path) -> torch.nn.Module:
    """The network that transformers reads from a file, dequantized to float32.

    `from_pretrained(gguf_file=…)` does the same with the package accelerate.
    """
    import transformers  # noqa: PLC0415  # takes 10 s
    from transformers.modeling_gguf_pytorch_utils import (  # noqa: PLC0415
        load_gguf_checkpoint,
    )

    load: Any = load_gguf_checkpoint
    stated = load(str(path))["config"]
    tied = stated.get("tie_word_embeddings", True)
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated))
    read = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(read, strict=False)
    assert left.missing_keys == ["lm_head.weight"] * tied, left
    return model
