"""Random weights as a source for `load_replica`: made on the device, one parameter at a time.

Nothing is read or copied, so a shape of 70 billion weights that are quantized as they come takes no
more memory than its quantized form and one matrix beside it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.checkpoint import SEED, random_weight
from model_service.model.config import ModelConfig
from model_service.model.weights.partition import is_linear, split_dimension


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """What an opened checkpoint offers, without files."""

    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Number of weights in the network."""
        return sum(torch.Size(size).numel() for size in self.config.parameter_shapes().values())

    def shard_parameters(self, shards: int, *, linear: bool | None = None) -> int:
        """Number of weights that one of `shards` ranks holds; `linear` counts those or the rest."""
        return sum(
            torch.Size(size).numel() // (1 if split_dimension(name) is None else shards)
            for name, size in self.config.parameter_shapes().items()
            if linear is None or is_linear(name) is linear
        )

    def read_shard(
        self, rank: int, shards: int, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of `rank` among `shards`, one parameter at a time, in the network's order."""
        for name, size in self.config.parameter_shapes().items():
            weight = random_weight(name, size, self.config, device)
            dimension = split_dimension(name)
            if dimension is not None and shards > 1:
                length = size[dimension] // shards
                weight = weight.narrow(dimension, rank * length, length).contiguous()
            yield name, weight.to(dtype)

    def fingerprint(self) -> str:
        """SHA-256 of what the weights are a function of, hexadecimal."""
        return hashlib.sha256(f"random {SEED} {self.config!r}".encode()).hexdigest()
