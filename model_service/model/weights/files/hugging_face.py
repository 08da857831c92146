"""Reads Hugging Face folders: `config.json` and safetensors files, onto any number of ranks.

Files are memory-mapped and only the slices of this rank are copied. Hugging Face rotates feature i
of a head with feature i + head_dim / 2, Meta neighbours; so the rows of wq and wk are put into
Meta's order while they are copied.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model_service.model.config import ModelConfig
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.errors import CheckpointError, shown_names, shown_shape
from model_service.model.weights.files.digest import digest
from model_service.model.weights.files.hugging_face_config import read_config
from model_service.model.weights.files.read_parts import read_parts
from model_service.model.weights.files.safetensors_files import (
    StoredTensor,
    open_safetensors,
)
from model_service.model.weights.partition import split_dimension
from model_service.model.weights.source import Allocate, Shard, new_memory

FLOAT_TYPES = {torch.float32, torch.float16, torch.bfloat16}
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Meta's names and Hugging Face's of the parameters, without `layers.N.` and `.weight`.
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
# Computed from the configuration; older versions of transformers saved it.
_DERIVED = ".rotary_emb.inv_freq"
# Ends of the names of tensors in which GPTQ, AWQ, bitsandbytes and compressed-tensors keep weights.
_QUANTIZED = ("qweight", "qzeros", "scales", "g_idx", "absmax", "weight_scale", "weight_packed")
_OWN_CONFIG = "use the config.json that came with this file"


@dataclass(frozen=True, slots=True)
class HuggingFaceCheckpoint:
    """An opened folder. Names and shapes have been checked; no weight has been read yet.

    Attributes:
        folder: of the checkpoint.
        config: the network's shape.
        tensors: by Hugging Face's names.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]
    files: tuple[Path, ...]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type of the parameter `name` in its file."""
        return self.tensors[stored_as(name, self.config)].dtype

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one rank, one parameter at a time, in the network's order.

        Raises:
            CheckpointError: after the last parameter, if any is not finite in the shard's dtype.
        """
        return read_parts(
            self.folder,
            self.config,
            shard,
            allocate,
            self._copy,
            stored_as=lambda name: stored_as(name, self.config),
        )

    def _copy(self, name: str, start: int, weight: torch.Tensor, upload: WeightUpload) -> None:
        part = self.tensors[stored_as(name, self.config)]
        dimension = split_dimension(name)
        if dimension is not None:
            part = part.narrow(dimension, start, weight.shape[dimension])
        if name.endswith(("wq.weight", "wk.weight")):
            heads = len(part) // self.config.head_dim
            halves = part.view(heads, 2, self.config.head_dim // 2, -1)
            upload.copy(halves.transpose(1, 2), weight.view(heads, -1, 2, part.shape[1]))
        else:
            upload.copy(part, weight)

    def fingerprint(self) -> str:
        """SHA-256 of the shape and of all weights, hexadecimal.

        The division into files does not count. Reads all weights, as safetensors files have no
        checksums.
        """
        identity = f"{self.config!r} {digest(dict(self.tensors))}"
        return hashlib.sha256(identity.encode()).hexdigest()


def open_hugging_face(folder: Path) -> HuggingFaceCheckpoint:
    """Opens and checks the checkpoint in `folder`: `config.json` and its safetensors files.

    Raises:
        CheckpointError: a file is missing, damaged or contradicts another, or the network is not
            one that this engine computes; the message names the file and the fix.
    """
    config = read_config(folder / "config.json")
    stored = open_safetensors(folder)
    files = tuple(sorted({tensor.path for tensor in stored.values()}))
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(_DERIVED)}
    _check_tensors(folder, stored, config)
    tensors = {name: tensor.values for name, tensor in stored.items()}
    if config.tied_embeddings and OUTPUT in tensors:
        _check_tied(stored)
        del tensors[OUTPUT]
    return HuggingFaceCheckpoint(folder, config, tensors, files)


def stored_as(name: str, config: ModelConfig) -> str:
    """Hugging Face's name of the tensor that holds Meta's parameter `name`."""
    stem = name.removesuffix(".weight")
    if stem == "output" and config.tied_embeddings:
        stem = "tok_embeddings"
    if not stem.startswith("layers."):
        return f"{NAMES[stem]}.weight"
    _, number, rest = stem.split(".", 2)
    return f"model.layers.{number}.{NAMES[rest]}.weight"


def _check_tensors(folder: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raises CheckpointError unless `stored` are the parameters of the network."""
    for name, tensor in stored.items():
        _check_plain(name, tensor)
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    if len(layers) != config.n_layers:  # before any list that is as long as config.json states
        raise CheckpointError(
            folder,
            f"holds {len(layers)} layers, config.json states num_hidden_layers {config.n_layers}",
            _OWN_CONFIG,
        )
    shapes = {stored_as(name, config): shape for name, shape in config.parameter_shapes().items()}
    if missing := [name for name in shapes if name not in stored]:
        fix = _OWN_CONFIG
        if missing == [OUTPUT]:
            fix = "set tie_word_embeddings to true in config.json if the embedding is its matrix"
        raise CheckpointError(folder, f"lacks {shown_names(missing)}", fix)
    allowed = {*shapes, OUTPUT} if config.tied_embeddings else set(shapes)
    if unexpected := [name for name in stored if name not in allowed]:
        path = stored[unexpected[0]].path
        raise CheckpointError(path, f"also holds {shown_names(unexpected)}", _OWN_CONFIG)
    for name, shape in shapes.items():
        _check_shape(name, stored[name], shape)


def _check_plain(name: str, tensor: StoredTensor) -> None:
    """Raises CheckpointError if the tensor is a bias, or not in floating point."""
    if name.endswith(".bias"):
        raise CheckpointError(
            tensor.path,
            f"holds {name}, but linear layers have no bias here",
            "serve a checkpoint with Llama's architecture",
        )
    if name.endswith(_QUANTIZED) or tensor.values.dtype not in FLOAT_TYPES:
        dtype = str(tensor.values.dtype).removeprefix("torch.")
        raise CheckpointError(
            tensor.path,
            f"{name} is {dtype}, of a quantized layer; float32, bfloat16 and float16 weights are "
            "supported",
            "serve the original checkpoint; --quantize quantizes it when it is loaded",
        )


def _check_shape(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.values.shape) != shape:
        raise CheckpointError(
            tensor.path,
            f"{name} is {shown_shape(tuple(tensor.values.shape))}; config.json makes it "
            f"{shown_shape(shape)}",
            _OWN_CONFIG,
        )


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError if a tied output matrix is stored, and is not the embedding."""
    output = stored[OUTPUT]
    if not torch.equal(output.values, stored[EMBEDDING].values):
        raise CheckpointError(
            output.path,
            f"{OUTPUT} is not {EMBEDDING}, though config.json has tie_word_embeddings true",
            "set tie_word_embeddings to false in config.json",
        )
