"""`python -m model_service.model.weights.conversion`: writes a checkpoint in another format.

Weights keep their numbers and types. The tokenizer's files are not part of a conversion.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from model_service.model.weights.conversion.write_hugging_face import write_hugging_face
from model_service.model.weights.conversion.write_meta import write_meta
from model_service.model.weights.open_weights import open_weights
from model_service.model.weights.source import WeightSource
from serving.errors import StartError

WRITERS: dict[str, Callable[[WeightSource, Path], None]] = {
    "meta": write_meta,
    "hugging-face": write_hugging_face,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model_service.model.weights.conversion", description=__doc__
    )
    parser.add_argument("--ckpt_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--to", choices=[*WRITERS], required=True)
    arguments = parser.parse_args()
    try:
        WRITERS[arguments.to](open_weights(arguments.ckpt_dir), arguments.output_dir)
    except StartError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
