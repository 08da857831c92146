"""Reading one rank's part of every parameter, whatever file holds it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model_service.model.config import ModelConfig
from model_service.model.cuda.pinned_transfer import WeightUpload
from model_service.model.weights.finite import check_finite, extremes
from model_service.model.weights.partition import part_shape, split_dimension
from model_service.model.weights.source import Allocate, Shard

# Fills memory with the parameter of a name, from an element on along the dimension that is split.
CopyPart = Callable[[str, int, torch.Tensor, WeightUpload], None]


def read_parts(
    path: Path,
    config: ModelConfig,
    shard: Shard,
    allocate: Allocate,
    copy: CopyPart,
    *,
    stored_as: Callable[[str], str] = str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of `shard`, one parameter at a time, in the network's order.

    Args:
        path: of the weights, for messages.
        config: the network's shape.
        shard: which parts.
        allocate: gives the memory of each.
        copy: reads one part.
        stored_as: the name in the file of the parameter with Meta's name, for messages.

    Raises:
        CheckpointError: after the last parameter, if any is not finite in the shard's dtype.
    """
    upload = WeightUpload(shard.device)
    found: dict[str, torch.Tensor] = {}  # checked at the end, so that no copy waits
    for name, shape in config.parameter_shapes().items():
        own = part_shape(name, shape, shard.shards)
        weight = allocate(name, own, shard.dtype, shard.device)
        dimension = split_dimension(name)
        copy(name, 0 if dimension is None else shard.rank * own[dimension], weight, upload)
        found[stored_as(name)] = extremes(weight)
        yield name, weight
    check_finite(path, found)
