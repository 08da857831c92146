"""The network, or its layers alone, in one call of the compiled library.

Between two products, Python finds its own code and data no longer in the processor's caches,
because the weights have passed through them: a step of one stream would spend a fifth of its time
so.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

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


class _Ends(ctypes.Structure):
    _fields_ = (
        ("embedding", _POINTER),
        ("rotation", _POINTER),
        ("norm", _POINTER),
        ("output", Weight),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", _POINTER),
        ("wanted", _POINTER),
        ("logits", _POINTER),
        ("finite", _POINTER),
        ("largest", _POINTER),
        ("count", _INT),
    )


@dataclass(frozen=True, slots=True)
class Ends:
    """The rest of the network: before the layers and behind them."""

    embedding: torch.Tensor  # [vocab, dim]
    rotation: torch.Tensor  # complex64 [positions, head_dim / 2]
    norm: torch.Tensor  # [dim]
    output: PackedBlocks


class CompiledLayers:
    """All layers of a rank, computed as the network does layer by layer, bit for bit.

    Attributes:
        kernels: that compute them.
        network: as the library takes it.
        halves: how many halves of layers there are.
    """

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
        self.kernels = kernels
        self._sum_over_shards = sum_over_shards
        self._weights = weights  # keeps the memory to which the structures point
        layers = (_Layer * len(weights))()
        for layer, each in zip(layers, weights, strict=True):
            layer.attention_norm = each.attention_norm.data_ptr()
            layer.ffn_norm = each.ffn_norm.data_ptr()
            for name in ("wqkv", "wo", "w13", "w2"):
                setattr(layer, name, getattr(each, name).weight)
        self.halves = 2 * len(weights)
        dim = len(weights[0].attention_norm)
        self.network = _Network(layers, kernels.type, dim, heads, eps)

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
        memory = (each.data_ptr() for each in (x, residual, angles))
        step = _step(*memory, caches=caches, spans=spans, rows=len(x))
        if self._sum_over_shards is None:
            self.kernels.run_layers(self.network, step, 0, self.halves)
            return x, residual
        for half in range(self.halves):
            self.kernels.run_layers(self.network, step, half, half + 1)
            self._sum_over_shards(x)
        return x, residual


class Scan(NamedTuple):
    """Facts about logits [rows, vocab] that the kernels found while they made them."""

    finite: list[bool]  # for each row whether all of its logits are
    largest: list[int]  # the lowest id among the largest of each row that is finite
    address: int  # of the logits, which are contiguous
    vocab: int


class CompiledStep:
    """The whole network of one rank that is not divided, computed as by parts, bit for bit."""

    def __init__(self, layers: CompiledLayers, ends: Ends) -> None:
        """Keeps the weights' memory."""
        self._layers = layers
        self._ends = ends
        self._logits = torch.empty(0, ends.output.weight.outputs)
        self._rotation = torch.view_as_real(ends.rotation).contiguous()
        self._structure = _Ends(
            ends.embedding.data_ptr(),
            self._rotation.data_ptr(),
            ends.norm.data_ptr(),
            ends.output.weight,
        )

    def run(
        self,
        tokens: NDArray[np.int32],
        wanted: NDArray[np.int32],
        caches: "ctypes.Array[AttentionCache]",
        spans: "ctypes.Array[AttentionSpan]",
    ) -> tuple[torch.Tensor, Scan]:
        """One step over a flat batch.

        Args:
            tokens: ids [num_tokens], sequence after sequence.
            wanted: ascending indices of the tokens whose logits are wanted [num_logits].
            caches: of each layer.
            spans: the sequences of the batch.

        Returns:
            Logits [num_logits, vocab] in float32, which the next step overwrites.
        """
        count = len(wanted)
        if count != len(self._logits):  # touching fresh memory takes longer than to compute it
            self._logits = torch.empty(count, self._ends.output.weight.outputs)
        finite, largest = (_INT * count)(), (_INT * count)()
        addresses = self._logits.data_ptr(), ctypes.addressof(finite), ctypes.addressof(largest)
        batch = _Batch(tokens.ctypes.data, wanted.ctypes.data, *addresses, count)
        step = _step(caches=caches, spans=spans, rows=len(tokens))
        layers = self._layers
        layers.kernels.run_step(layers.network, step, layers.halves, self._structure, batch)
        found = [bool(each) for each in finite], list(largest)
        return self._logits, Scan(*found, addresses[0], self._structure.output.outputs)


def _step(
    x: int | None = None,
    residual: int | None = None,
    angles: int | None = None,
    *,
    caches: "ctypes.Array[AttentionCache]",
    spans: "ctypes.Array[AttentionSpan]",
    rows: int,
) -> _Step:
    addresses = ctypes.addressof(caches), ctypes.addressof(spans)
    return _Step(x, residual, angles, *addresses, rows, len(spans), torch.get_num_threads())
