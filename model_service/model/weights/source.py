"""The interface of a source of weights, such as a checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from model_service.model.config import ModelConfig

# Memory for the parameter with Meta's name, of a shape, in a type, on a device.
Allocate = Callable[[str, tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


def new_memory(
    name: str,  # noqa: ARG001  # of the interface
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Memory that nothing else uses."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the weights that `rank` among `shards` holds in `dtype` on `device`."""

    rank: int
    shards: int
    dtype: torch.dtype
    device: torch.device


class WeightSource(Protocol):
    @property
    def config(self) -> ModelConfig:
        """The network's shape."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """The floating-point type that holds the parameter `name` as it is stored."""

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one rank, by Meta's names.

        Yields one parameter at a time, in the order of `ModelConfig.parameter_shapes`: contiguous,
        in the memory that `allocate` gives for it.
        """

    def fingerprint(self) -> str:
        """A text that is equal only for equal weights."""
