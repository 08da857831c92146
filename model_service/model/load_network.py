"""Loads weights into the network's layers, which join some of Meta's and pack all linear ones."""

from collections.abc import Iterable, Iterator

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from model_service.model.config import ModelConfig
from model_service.model.network import Transformer
from model_service.model.operations import make_operations
from model_service.model.weights.matrices import Pack
from model_service.model.weights.packing import plain

# Weights that multiply the same input are joined, row below row, into one matrix: one product
# instead of two or three.
_JOINED = {"wq": "wqkv", "wk": "wqkv", "wv": "wqkv", "w1": "w13", "w3": "w13"}


def load_network(
    config: ModelConfig,
    context_length: int,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    pack: Pack,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """The network with `weights` in place, ready for `forward`.

    Args:
        config: the network's shape.
        context_length: most tokens of a sequence.
        weights: Meta's names and this rank's part of each parameter, in the order of
            `ModelConfig.parameter_shapes`. They are read one by one, so none is in memory twice.
        pack: converts the weight of a linear layer to the form that its kernel reads.
        dtype: of all other weights.
        device: of this rank.
    """
    network = Transformer(config, make_operations(config, context_length, dtype, device))
    for name, weight in _join(network, weights):
        layer = network.get_submodule(name)
        del layer.weight
        whole = len(weight) == config.vocab_size
        if name == "output" and config.tied_embeddings and pack is plain and whole:
            # `shares_tied_output` counts on it.
            layer.weight = network.get_parameter("tok_embeddings.weight")
        elif isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            layer.weight = pack(weight)
        else:
            layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return network.eval().to(device)


def _join(
    network: Transformer, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by the names of this network's layers; a joined one is allocated once."""
    joined: torch.Tensor | None = None
    filled = 0
    for parameter, weight in weights:
        layer, _, name = parameter.removesuffix(".weight").rpartition(".")
        if name not in _JOINED:
            yield f"{layer}.{name}".lstrip("."), weight
            continue
        target = f"{layer}.{_JOINED[name]}"
        if joined is None:
            joined = weight.new_empty(network.get_parameter(f"{target}.weight").shape)
        joined[filled : filled + len(weight)] = weight
        filled += len(weight)
        if filled == len(joined):
            yield target, joined
            joined, filled = None, 0
