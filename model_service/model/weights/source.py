"""Where a network's weights come from: a checkpoint, or whatever else can name and cut them."""

from collections.abc import Iterator
from typing import Protocol

import torch

from model_service.model.config import ModelConfig


class WeightSource(Protocol):
    @property
    def config(self) -> ModelConfig:
        """The network's shape."""

    @property
    def parameters(self) -> int:
        """Number of weights in the network."""

    def shard_parameters(self, shards: int, *, linear: bool | None = None) -> int:
        """Number of weights that one of `shards` ranks holds; `linear` counts those or the rest."""

    def read_shard(
        self, rank: int, shards: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `rank` among `shards`, by Meta's names.

        One parameter at a time, in the order of `ModelConfig.parameter_shapes`, contiguous, in
        `dtype` on `device`. Whoever takes one may keep it.
        """

    def fingerprint(self) -> str:
        """Tells these weights from all others."""
