"""Writes a checkpoint with linear layers in int8, int4 or fp8.

It has Meta's format. The number of Meta's files stays: each shard's weights are quantized
separately, as a replica of as many shards does when it loads the original, so both give the same
answers.
"""

from pathlib import Path

from model_service.model.config import Quantization
from model_service.model.errors import CheckpointError
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.files.meta.checkpoint import Checkpoint
from model_service.model.weights.open_weights import open_weights


def quantize_checkpoint(source: Path, target: Path, quantization: Quantization) -> None:
    """Writes the checkpoint in `source`, in any format, to the new or empty folder `target`.

    Raises:
        StartError: the source is no checkpoint in floating point, its rows cannot be quantized
            so, or the target is in use or cannot be written.
    """
    weights = open_weights(source)
    stored = weights.config.quantization
    if stored != "none":
        problem = f"is quantized already, to {stored}"
        raise CheckpointError(source, problem, "quantize the original")
    files = len(weights.files) if isinstance(weights, Checkpoint) else 1
    write_meta(weights, target, files=files, quantization=quantization)
