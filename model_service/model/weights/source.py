"""The interface of a source of weights, such as a checkpoint."""

from collections.abc import Iterator
from typing import Protocol

import torch

from model_service.model.config import ModelConfig


class WeightSource(Protocol):
    @property
    def config(self) -> ModelConfig:
        """The network's shape."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """The floating-point type that holds the parameter `name` as it is stored."""

    def read_shard(
        self, rank: int, shards: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `rank` among `shards`, by Meta's names.

        Yields one parameter at a time, in the order of `ModelConfig.parameter_shapes`: contiguous,
        in `dtype` on `device`, and owned by the caller.
        """

    def fingerprint(self) -> str:
        """A text that is equal only for equal weights."""
