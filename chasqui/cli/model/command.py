"""`chasqui model`: work on checkpoints.

It needs PyTorch, which the client does without: the model service does it, in a process of its own.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import click


@click.group()
def model() -> None:
    """Work on checkpoints."""


@model.command()
@click.option(
    "--ckpt_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of a checkpoint in Meta's format.",
)
@click.option(
    "--output_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="New folder for the quantized checkpoint.",
)
@click.option(
    "--quantize",
    "quantization",
    type=click.Choice(["int8", "int4", "fp8"]),
    default="int8",
    show_default=True,
    help="Form of the linear layers' weights.",
)
def quantize(ckpt_dir: Path, output_dir: Path, quantization: str) -> None:
    """Write a quantized checkpoint, which loads as it is.

    It is half as large as one in 16 bits with int8 and fp8, three eighths with int4.
    """
    if importlib.util.find_spec("torch") is None:
        raise click.ClickException(
            "PyTorch is not installed here: pip install '.[model]' in the source tree brings it"
        )
    command = [sys.executable, "-m", "model_service.quantize", "--ckpt_dir", str(ckpt_dir)]
    command += ["--output_dir", str(output_dir), "--quantize", quantization]
    status = subprocess.run(command, check=False).returncode  # noqa: S603  # our own module
    if status:
        sys.exit(status)
    click.echo(f"{output_dir}: {quantization}. Serve it: chasqui serve --ckpt_dir {output_dir} …")
