"""`chasqui model`: work on checkpoints.

They need PyTorch, which the client does not, so a module of the model service runs as a process.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import click


@click.group()
def model() -> None:
    """Convert checkpoints."""


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
    help="Number format of the linear layers' weights.",
)
def quantize(ckpt_dir: Path, output_dir: Path, quantization: str) -> None:
    """Write a quantized checkpoint, which the model service loads directly.

    With int8 and fp8 it is half as large as a 16-bit one, with int4 three eighths.
    """
    if importlib.util.find_spec("torch") is None:
        raise click.ClickException(
            "PyTorch is not installed: run pip install '.[model]' in the source tree"
        )
    command = [sys.executable, "-m", "model_service.quantize", "--ckpt_dir", str(ckpt_dir)]
    command += ["--output_dir", str(output_dir), "--quantize", quantization]
    status = subprocess.run(command, check=False).returncode  # noqa: S603  # our own module
    if status:
        sys.exit(status)
    click.echo(f"{output_dir}: {quantization}. Serve it: chasqui serve --ckpt_dir {output_dir} …")
