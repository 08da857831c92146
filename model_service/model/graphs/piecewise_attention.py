"""Attention in a step that is recorded in pieces.

Its planning and its launches depend on the mixture of spans, so each layer calls it anew, between
two pieces. Rotation and the write to the cache depend on the number of rows alone: pieces hold
them, with slots, queries and results in buffers whose addresses stay the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from model_service.model.attention.backend import SequenceSpan
from model_service.model.attention.rotation import Cache, Heads, rotate_and_write
from model_service.model.graphs.recorder import Run


@runtime_checkable
class SeparableAttention(Protocol):
    """A backend that attends apart from the write to the cache before it."""

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        """See `AttentionBackend`."""

    @property
    def slots(self) -> torch.Tensor:
        """int32 [tokens], where each token of the planned step lies in the cache."""

    def layer_cache(self, layer: int) -> Cache:
        """Keys and values of a layer."""

    def attend_written(self, layer: int, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attends the planned step's tokens, which are in the cache.

        Args:
            layer: selects the part of the cache.
            query: rotated [rows, heads, head_dim], contiguous; rows behind the tokens are padding.
            output: receives the result, likewise; padding is left as it is.
        """


@dataclass(frozen=True, slots=True)
class PieceBuffers:
    """The memory in which pieces and attention leave each other numbers, the same in all layers.

    Attributes:
        slots: int32 [rows], where the pieces write keys and values.
        query: rotated [rows, heads, head_dim].
        output: of attention, likewise.
    """

    slots: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(
        cls, rows: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> "PieceBuffers":
        """For so many rows of heads × head_dim numbers."""
        # Results of padding are zeros at first, so that it stays finite.
        query, output = (torch.zeros(rows, *heads, dtype=dtype, device=device) for _ in range(2))
        return cls(torch.zeros(rows, dtype=torch.int32, device=device), query, output)

    def first(self, rows: int) -> "PieceBuffers":
        return PieceBuffers(self.slots[:rows], self.query[:rows], self.output[:rows])


class PiecewiseAttention:
    """A backend for the network while it is recorded, and for the plans of repetitions."""

    def __init__(
        self,
        attention: SeparableAttention,
        buffers: PieceBuffers,
        between: Callable[[Run], None],
    ) -> None:
        """Calls `attention` by a recorder's `between`, for as many rows as the buffers have."""
        self._attention = attention
        self._buffers = buffers
        self._between = between

    def plan(self, spans: Sequence[SequenceSpan]) -> None:
        """Padding lies at the beginning of the probe block, which no sequence owns."""
        self._attention.plan(spans)
        slots, tokens = self._buffers.slots, len(self._attention.slots)
        slots[:tokens].copy_(self._attention.slots)
        slots[tokens:].zero_()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return self.rotate_and_attend(layer, Heads(query, key, value), None)

    def rotate_and_attend(
        self, layer: int, heads: Heads, rotation: torch.Tensor | None
    ) -> torch.Tensor:
        """See `rotation.RotateAndAttend`."""
        cache, buffers = self._attention.layer_cache(layer), self._buffers
        rotate_and_write(heads, rotation, cache, buffers.slots, buffers.query)
        return self._attended(layer)

    def run_layers(
        self,
        layers: Any,  # noqa: ANN401  # `InvariantLayers`, whose module needs Triton
        x: torch.Tensor,
        rotation: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """See `RunsLayers`."""
        slots, query = self._buffers.slots, self._buffers.query.flatten(1)

        def attended(layer: int, _: torch.Tensor) -> torch.Tensor:
            return self._attended(layer).flatten(1)

        cache = self._attention.layer_cache
        return layers.run(x, rotation, cache, slots, attended, query=query), None

    def _attended(self, layer: int) -> torch.Tensor:
        query, output = self._buffers.query, self._buffers.output
        self._between(partial(self._attention.attend_written, layer, query, output))
        return output
