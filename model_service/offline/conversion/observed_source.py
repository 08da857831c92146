"""A source of weights whose reading is checked and reported, and whose types may be others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model_service.model.config import ModelConfig
from model_service.model.weights.finite import check_finite, extremes
from model_service.model.weights.source import Allocate, Shard, WeightSource, new_memory

TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class ObservedSource:
    """The weights of `source`.

    Each is checked before it is handed on, so that no finished file holds one that is not finite.

    Attributes:
        source: of the weights.
        path: of the source, for messages.
        dtype: the type that all weights count as stored in; None keeps each weight's own.
        advance: is told the bytes of each weight that was handled.
    """

    source: WeightSource
    path: Path
    dtype: torch.dtype | None
    advance: Callable[[int], None]

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.dtype or self.source.stored_dtype(name)

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.source.read_shard(shard, allocate):
            stored = self.stored_dtype(name)
            check_finite(self.path, {name: extremes(weight).to(stored)})
            yield name, weight
            self.advance(weight.numel() * stored.itemsize)

    def fingerprint(self) -> str:
        return self.source.fingerprint()
