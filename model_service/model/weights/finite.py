"""Checks that weights are finite numbers in the type in which they are read."""

from collections.abc import Mapping
from pathlib import Path

import torch

from model_service.model.errors import CheckpointError


def extremes(weight: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest value [2]; NaN if the weight holds one."""
    return torch.stack(torch.aminmax(weight))


def check_finite(path: Path, found: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError unless the `extremes` of all tensors are finite."""
    for name, values in found.items():
        if not values.isfinite().all():
            dtype = str(values.dtype).removeprefix("torch.")
            raise CheckpointError(
                path,
                f"{name} holds NaN, or numbers that are infinite in {dtype}",
                "use a checkpoint whose weights are finite, or another --dtype",
            )
