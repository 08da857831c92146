"""Loads weights into the network's layers, which join some of Meta's and pack all linear ones."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    get_model_parallel_world_size,
)
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from model_service.model.config import ModelConfig
from model_service.model.cpu import shard_sum
from model_service.model.cpu.kernels import Kernels, kernels_for
from model_service.model.cpu.layers import CompiledLayers, CompiledStep, Ends, LayerWeights
from model_service.model.network import Transformer, sum_over_shards
from model_service.model.operations import Operations, RowOperations, make_operations
from model_service.model.weights.matrices import Pack
from model_service.model.weights.packing import plain
from model_service.model.weights.partition import is_linear
from model_service.model.weights.source import Allocate, new_memory

# Weights that multiply the same input are joined, row below row, into one matrix: one product
# instead of two or three.
_JOINED = {"wq": "wqkv", "wk": "wqkv", "wv": "wqkv", "w1": "w13", "w3": "w13"}

# Reads Meta's names and this rank's part of each parameter, one by one in the order of
# `ModelConfig.parameter_shapes`, each into memory that was asked for when its turn came.
Read = Callable[[Allocate], Iterable[tuple[str, torch.Tensor]]]


def load_network(
    config: ModelConfig,
    context_length: int,
    read: Read,
    *,
    pack: Pack,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool = False,
) -> Transformer:
    """The network with its weights in place, ready for `forward`.

    Args:
        config: the network's shape.
        context_length: most tokens of a sequence.
        read: reads the weights. None is in memory twice, except for one that is being packed.
        pack: converts the weight of a linear layer to the form that its kernel reads.
        dtype: of all other weights.
        device: of this rank.
        batch_invariant: whether the kernels of `model/cuda/` compute it; `pack` is then theirs.
    """
    operations = make_operations(
        config, context_length, dtype, device, batch_invariant=batch_invariant
    )
    network = Transformer(config, operations)
    memory = _MatrixMemory(network)
    for name, weight in _join(memory, read(memory.allocate)):
        layer = network.get_submodule(name)
        del layer.weight
        whole = len(weight) == config.vocab_size
        if name == "output" and config.tied_embeddings and pack is plain and whole:
            # `shares_tied_output` counts on it.
            layer.weight = network.get_parameter("tok_embeddings.weight")
        elif isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            packed = pack(weight)
            layer.weight = memory.hand_over() if packed is weight else packed
        else:
            layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if batch_invariant:
        network.compiled_layers = _invariant_layers(network)
    elif kernels := kernels_for(dtype, device):
        network.compiled_layers = layers = _compiled_layers(network, kernels)
        if layers is not None and get_model_parallel_world_size() == 1:
            network.compiled_step = _compiled_step(network, layers, operations)
    return network.eval().to(device)


def _compiled_layers(network: Transformer, kernels: Kernels) -> CompiledLayers | None:
    """All layers in one call of the CPU's library, if their weights have its form."""
    weights = [_layer_weights(layer) for layer in network.layers]
    packed = [each for each in weights if each is not None]
    if len(packed) < len(weights):
        return None
    layer: Any = network.get_submodule("layers.0")
    is_sharded = get_model_parallel_world_size() > 1
    add = sum_over_shards if is_sharded else None
    return CompiledLayers(kernels, packed, layer.attention.heads, network.norm.eps, add)


def _compiled_step(
    network: Transformer, layers: CompiledLayers, operations: Operations
) -> CompiledStep | None:
    """A whole step in one call of the CPU's library, if the output matrix has its form too."""
    output = getattr(network.get_submodule("output").weight, "blocks", None)
    if output is None or not isinstance(operations, RowOperations):
        return None
    embedding = network.get_parameter("tok_embeddings.weight")
    return CompiledStep(layers, Ends(embedding, operations.rotary, network.norm.weight, output))


def _invariant_layers(network: Transformer) -> object:
    """All layers by the Triton kernels that are batch-invariant."""
    from model_service.model.cuda import layers  # noqa: PLC0415  # needs Triton

    weights = [layers.LayerWeights(**_parts(layer)) for layer in network.layers]
    is_sharded = get_model_parallel_world_size() > 1
    return layers.InvariantLayers(weights, network.norm.eps, _sum_in_order if is_sharded else None)


def _sum_in_order(x: torch.Tensor) -> None:
    """Adds up, in place, the parts of a product on all ranks, in the order of the ranks."""
    shard_sum.sum_over_shards(x, get_model_parallel_group())


def _layer_weights(layer: nn.Module) -> LayerWeights | None:
    parts = _parts(layer)
    return None if None in parts.values() else LayerWeights(**parts)


def _parts(layer: Any) -> dict[str, Any]:  # noqa: ANN401  # nn.Module knows no attributes
    """A layer's norms, and its matrices, each None where no kernel of whole layers reads it."""
    matrices = {
        "wqkv": layer.attention.wqkv.weight,
        "wo": layer.attention.wo.weight,
        "w13": layer.feed_forward.w13.weight,
        "w2": layer.feed_forward.w2.weight,
    }
    return {
        "attention_norm": layer.attention_norm.weight,
        "ffn_norm": layer.ffn_norm.weight,
        **{name: getattr(weight, "blocks", None) for name, weight in matrices.items()},
    }


def _join(
    memory: "_MatrixMemory", weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by the names of this network's layers."""
    for parameter, weight in weights:
        if not is_linear(parameter):
            yield _layer(parameter), weight
        elif memory.is_full:
            yield _layer(parameter), memory.matrix


def _layer(parameter: str) -> str:
    """The name of the layer that holds a parameter."""
    layer, _, name = parameter.removesuffix(".weight").rpartition(".")
    return f"{layer}.{_JOINED.get(name, name)}".lstrip(".")


class _MatrixMemory:
    """Memory for the matrix of one linear layer at a time.

    Weights that are joined are read to their places in it. Packing leaves it free for the next
    matrix: new memory for each would cost more time than to read the weights.

    Attributes:
        matrix: of the layer whose weights are being read.
        is_full: whether all of them have been asked for.
    """

    def __init__(self, network: Transformer) -> None:
        self._network = network
        self._buffer: torch.Tensor | None = None
        self._rows = 0  # of the matrix that have been asked for
        self.matrix = torch.empty(0, 0)

    @property
    def is_full(self) -> bool:
        return self._rows == len(self.matrix)

    def allocate(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """As `Allocate`: new memory for a parameter that belongs to no linear layer."""
        if not is_linear(name):
            return new_memory(name, shape, dtype, device)
        if self.is_full:
            whole = self._network.get_parameter(f"{_layer(name)}.weight").shape
            self.matrix, self._rows = self._view(whole, dtype, device), 0
        begin, self._rows = self._rows, self._rows + shape[0]
        return self.matrix[begin : self._rows]

    def hand_over(self) -> torch.Tensor:
        """The matrix in memory that is not used again."""
        if self._buffer is None or self._buffer.numel() > self.matrix.numel():
            return self.matrix.clone()
        self._buffer = None
        return self.matrix

    def _view(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = shape.numel()
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer, self.matrix = None, torch.empty(0, 0)  # frees it first
            self._buffer = torch.empty(size, dtype=dtype, device=device)
        return self._buffer[:size].view(shape)
