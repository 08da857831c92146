"""Writes a Hugging Face folder: `config.json` and safetensors files."""

import collections
import itertools
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model_service.model.config import ModelConfig
from model_service.model.weights.conversion.mapped_tensors import mapped_tensors
from model_service.model.weights.conversion.target import Target, new_folder
from model_service.model.weights.files.hugging_face import stored_as
from model_service.model.weights.files.weight_files import INDEX, SINGLE
from model_service.model.weights.source import Shard, WeightSource

CPU = torch.device("cpu")
# As large as those of transformers before version 5.
FILE_BYTES = 5 * 10**9
# transformers' own default, for sources that do not know it.
_CONTEXT = 2048


def write_hugging_face(source: WeightSource, folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Writes the weights of `source`, each in the type in which it is stored there.

    Args:
        source: of the weights.
        folder: new or empty.
        file_bytes: most bytes of a file, unless one tensor is larger. A file is collected in
            mapped temporary files, so memory holds one tensor, and the disk needs room for the file
            twice.

    Raises:
        StartError: the weights are not finite, or the folder is in use or cannot be written.
    """
    with new_folder(folder) as target:
        write_hugging_face_into(target, source, file_bytes=file_bytes)


def write_hugging_face_into(
    target: Target, source: WeightSource, *, file_bytes: int = FILE_BYTES
) -> None:
    """`write_hugging_face` into a folder that is open, and may hold finished files."""
    files = _files(source, file_bytes)
    weights = _weights(source)
    for file, names in files.items():
        own = itertools.islice(weights, len(names))
        if target.is_finished(file):
            # A source is read in its order, so the weights of finished files pass by.
            collections.deque(own, maxlen=0)
            continue
        target.write(file, partial(_save, own, target.staging / "tensors"))
    # The source checks its weights after the last one.
    if rest := list(weights):
        raise AssertionError(f"{len(rest)} weights are in no file")
    if len(files) > 1:
        _write_json(target, INDEX, _index(source, files))
    _write_json(target, "config.json", _settings(source))


def _save(tensors: Iterator[tuple[str, torch.Tensor]], staging: Path, path: Path) -> None:
    with mapped_tensors(staging, tensors) as mapped:
        save_file(dict(mapped), path, metadata={"format": "pt"})


def _stored_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's names of the tensors to write, by Meta's."""
    names = {name: stored_as(name, config) for name in config.parameter_shapes()}
    if config.tied_embeddings:
        del names["output.weight"]
    return names


def _weights(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    names, config = _stored_names(source.config), source.config
    for name, weight in source.read_shard(Shard(0, 1, torch.float32, CPU)):
        if name not in names:
            continue
        stored = weight.to(source.stored_dtype(name))
        if name.endswith(("wq.weight", "wk.weight")):
            stored = halves_from_pairs(stored, config.head_dim)
        yield names[name], stored


def halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Moves the rows of wq or wk [heads × head_dim, dim] from neighbouring pairs to two halves.

    `permute` in transformers' convert_llama_weights_to_hf.py.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _sizes(source: WeightSource) -> dict[str, int]:
    """The bytes of each tensor to write, by Hugging Face's names."""
    shapes = source.config.parameter_shapes()
    return {
        stored: math.prod(shapes[name]) * source.stored_dtype(name).itemsize
        for name, stored in _stored_names(source.config).items()
    }


def _files(source: WeightSource, file_bytes: int) -> dict[str, list[str]]:
    """The names of the tensors in each file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in _sizes(source).items():
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _index(source: WeightSource, files: dict[str, list[str]]) -> dict[str, Any]:
    places = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(_sizes(source).values())}, "weight_map": places}


def _settings(source: WeightSource) -> dict[str, Any]:
    """The content of `config.json`, with rotary settings where each transformers reads them."""
    config = source.config
    dtype = source.stored_dtype("layers.0.attention.wq.weight")
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.trained_context_length or _CONTEXT,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    scaling = config.rope_scaling
    if scaling is not None:
        settings["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            settings["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context_length,
            }
    return settings


def _write_json(target: Target, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    target.write(name, lambda path: path.write_text(text, encoding="utf-8"))
