"""`python -m model_service.quantize`: writes a checkpoint with linear layers in int8, int4 or fp8.

It has Meta's format. The number of Meta's files stays: each shard's weights are quantized
separately, as a replica of as many shards does when it loads the original, so both give the same
answers.
"""

import argparse
from pathlib import Path

from model_service.model.config import Quantization
from model_service.model.errors import CheckpointError
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.files.meta_checkpoint import Checkpoint
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.quantization import FORMATS
from serving.errors import StartError


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_service.quantize", description=__doc__)
    parser.add_argument("--ckpt_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--quantize", choices=[*FORMATS], default="int8")
    arguments = parser.parse_args()
    try:
        quantize_checkpoint(arguments.ckpt_dir, arguments.output_dir, arguments.quantize)
    except StartError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
