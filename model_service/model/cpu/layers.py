"""The network's layers in one call of the compiled library.

Between two products, Python finds its own code and data no longer in the processor's caches,
because the weights have passed through them: a step of one stream would spend a fifth of its time
so.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model_service.model.cpu.kernels import AttentionCache, AttentionSpan, Kernels
from model_service.model.cpu.products import PackedBlocks, Weight

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights: norms [dim], and packed matrices."""

    attention_norm: torch.Tensor
    wqkv: PackedBlocks
    wo: PackedBlocks
    ffn_norm: torch.Tensor
    w13: PackedBlocks
    w2: PackedBlocks


class _Layer(ctypes.Structure):
    """As in source/layers.cpp, like the others here."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("ffn_norm", _POINTER),
        ("wqkv", Weight),
        ("wo", Weight),
        ("w13", Weight),
        ("w2", Weight),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("type", _INT),
        ("dim", _INT),
        ("heads", _INT),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("x", _POINTER),
        ("residual", _POINTER),
        ("angles", _POINTER),
        ("caches", _POINTER),
        ("spans", _POINTER),
        ("rows", _INT),
        ("span_count", _INT),
        ("threads", _INT),
    )


class CompiledLayers:
    """All layers of a rank, computed as the network does layer by layer, bit for bit."""

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[LayerWeights],
        heads: int,
        eps: float,
        sum_over_shards: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """Keeps the weights' memory.

        Args:
            kernels: that compute the layers.
            weights: of all layers.
            heads: query heads of the rank.
            eps: of the norms.
            sum_over_shards: adds up in place the parts of a product on all ranks; None if there is
                one rank.
        """
        self._kernels = kernels
        self._sum_over_shards = sum_over_shards
        self._weights = weights  # keeps the memory to which the structures point
        layers = (_Layer * len(weights))()
        for layer, each in zip(layers, weights, strict=True):
            layer.attention_norm = each.attention_norm.data_ptr()
            layer.ffn_norm = each.ffn_norm.data_ptr()
            for name in ("wqkv", "wo", "w13", "w2"):
                setattr(layer, name, getattr(each, name).weight)
        dim = len(weights[0].attention_norm)
        self._network = _Network(layers, kernels.type, dim, heads, eps)

    def run(
        self,
        x: torch.Tensor,
        angles: torch.Tensor,
        caches: "ctypes.Array[AttentionCache]",
        spans: "ctypes.Array[AttentionSpan]",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step over a flat batch.

        Args:
            x: embeddings [tokens, dim], contiguous; overwritten.
            angles: complex64 [tokens, head_dim / 2].
            caches: of each layer.
            spans: the sequences of the batch.

        Returns:
            The last layer's output [tokens, dim], and the residual stream to which it is still to
            be added.
        """
        residual = torch.empty_like(x)
        step = _Step(
            x.data_ptr(),
            residual.data_ptr(),
            angles.data_ptr(),
            ctypes.addressof(caches),
            ctypes.addressof(spans),
            len(x),
            len(spans),
            torch.get_num_threads(),
        )
        halves = 2 * len(self._weights)
        if self._sum_over_shards is None:
            self._kernels.run_layers(self._network, step, 0, halves)
            return x, residual
        for half in range(halves):
            self._kernels.run_layers(self._network, step, half, half + 1)
            self._sum_over_shards(x)
        return x, residual
