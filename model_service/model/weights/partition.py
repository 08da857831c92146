"""The cut of the network's parameters into the equal parts of Meta's files.

Llama 2 splits `tok_embeddings` on dimension 1 (fairscale's ParallelEmbedding), and so do the ranks
here. The files of Llama 3 split it on dimension 0 (VocabParallelEmbedding).
"""

import math

from model_service.model.config import ModelConfig

EMBEDDING = "tok_embeddings.weight"
SPLIT_DIMENSION = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}


def is_linear(name: str) -> bool:
    """Whether the parameter `name` belongs to a linear layer, and so may be quantized."""
    return split_dimension(name) is not None and name != EMBEDDING


def split_dimension(name: str) -> int | None:
    """The dimension on which Meta's files split the parameter `name`; None if they do not."""
    return SPLIT_DIMENSION.get(name.removesuffix(".weight").rpartition(".")[2])


def part_shape(name: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of one of `parts` of the parameter `name`, whose whole shape is `shape`."""
    dimension = split_dimension(name)
    if dimension is None:
        return shape
    return (*shape[:dimension], shape[dimension] // parts, *shape[dimension + 1 :])


def splits_vocabulary(part: tuple[int, ...], config: ModelConfig, parts: int) -> bool:
    """Whether `part` is the shape of one of `parts` of the embedding as Llama 3 splits it."""
    return parts > 1 and part == (config.vocab_size // parts, config.dim)


def shard_parameters(config: ModelConfig, shards: int, *, linear: bool | None = None) -> int:
    """Number of weights on one of `shards` ranks: all, those of linear layers, or the rest.

    A tied output matrix counts, because a rank holds its part of it in the form of linear layers.
    """
    return sum(
        math.prod(shape) // (1 if split_dimension(name) is None else shards)
        for name, shape in config.parameter_shapes().items()
        if linear is None or is_linear(name) is linear
    )
