"""Random weights: as a checkpoint in Meta's format, or made on the device as they are loaded.

Weights are rounded to bfloat16 before anything sees them, so every export to a wider type holds
exactly the same numbers, and engines can be compared token by token.
"""

import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.shapes import Shape
from model_service.model.config import ModelConfig
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.partition import split_dimension
from model_service.model.weights.source import Allocate, Shard, new_memory

SEED = 2023
CPU = torch.device("cpu")


def ensure_checkpoint(shape: Shape, work_dir: Path, device: torch.device = CPU) -> Path:
    """The folder with the shape's params.json and consolidated.00.pth, written if it is missing.

    Args:
        shape: of the network.
        work_dir: keeps checkpoints between runs.
        device: draws the weights; other devices draw other numbers.
    """
    folder = work_dir / "checkpoints" / shape.name
    if not folder.exists():
        with complete_or_absent(folder) as partial:
            write_meta(RandomWeights(shape.config, device), partial)
    return folder


@contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which becomes `target` if nothing fails."""
    partial = target.with_name(f"{os.getpid()}.{target.name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def random_weight(
    name: str, size: tuple[int, ...], config: ModelConfig, device: torch.device = CPU
) -> torch.Tensor:
    """A parameter in bfloat16 on `device`, for each kind of device a function of its name alone.

    Matrices have a standard deviation of 1 / √inputs, so that each keeps the size of its input;
    those that add to the residual stream share it among all layers (Radford et al., 2019), so that
    it stays of order one from the first layer to the last.
    """
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(SEED + zlib.crc32(name.encode()))
    deviation = 1.0 if name.startswith("tok_embeddings") else 1 / math.sqrt(size[1])
    if name.endswith(("wo.weight", "w2.weight")):
        deviation /= math.sqrt(2 * config.n_layers)
    drawn = torch.randn(size, generator=generator, device=device)
    return drawn.mul_(deviation).to(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """A WeightSource without files: each parameter is made on the device when it is read.

    Nothing is copied, so a shape of 70 billion weights that are quantized as they come takes no
    more memory than its quantized form and one matrix beside it.
    """

    config: ModelConfig
    drawn_on: torch.device | None = None  # default: the device that they are read to

    def stored_dtype(self, name: str) -> torch.dtype:  # noqa: ARG002  # all are alike
        """The type in which each parameter is drawn."""
        return torch.bfloat16

    def read_shard(
        self, shard: Shard, allocate: Allocate = new_memory
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of one rank, one parameter at a time, in the network's order."""
        for name, size in self.config.parameter_shapes().items():
            weight = random_weight(name, size, self.config, self.drawn_on or shard.device)
            dimension = split_dimension(name)
            if dimension is not None and shard.shards > 1:
                length = size[dimension] // shard.shards
                weight = weight.narrow(dimension, shard.rank * length, length).contiguous()
            memory = allocate(name, tuple(weight.shape), shard.dtype, shard.device)
            yield name, memory.copy_(weight)

    def fingerprint(self) -> str:
        """SHA-256 of what the weights are a function of, hexadecimal."""
        return hashlib.sha256(f"random {SEED} {self.config!r}".encode()).hexdigest()
