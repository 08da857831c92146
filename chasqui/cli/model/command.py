"""`chasqui model`: work on the files of a model.

It needs the packages of the extra `model`, which the client does without: the model service's
programs do it, in a process of their own.
"""

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import click

from llama.model_files import ModelFileError, find_tokenizer

_MODEL = click.Path(path_type=Path)


@click.group()
def model() -> None:
    """Inspect, verify, convert and quantize the files of a model."""


@model.command()
@click.argument("path", type=_MODEL)
@click.option(
    "--tokenizer_path",
    type=click.Path(path_type=Path),
    help="The model's tokenizer.  [default: the one beside the weights]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are in bytes.")
def inspect(path: Path, tokenizer_path: Path | None, *, as_json: bool) -> None:
    """Describe the model at PATH: shape, types, and what it needs on this machine.

    PATH is a folder in Meta's or Hugging Face's format, or a GGUF file. Only headers are read.
    Exit status: 1 if the model cannot be served as it is.
    """
    arguments = ["inspect", str(path)]
    arguments += ["--tokenizer_path", str(tokenizer_path)] if tokenizer_path else []
    _run_offline(*arguments, *(["--json"] if as_json else []))


@model.command()
@click.argument("path", type=_MODEL)
def verify(path: Path) -> None:
    """Check that the files of the model at PATH are whole, one line each.

    Compares checksums where the files have some: checklist.chk, SHA256SUMS, those that Hugging
    Face's hub left, and those inside .pth archives. Exit status: 1 if a file is damaged or missing.
    """
    _run_offline("verify", str(path))


@model.command()
@click.argument("source", type=_MODEL)
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["meta", "hf"]),
    required=True,
    help="Format of the new folder: Meta's or Hugging Face's.",
)
@click.option(
    "--files",
    type=click.IntRange(1),
    help="Files to divide the weights among, in Meta's format.  [default: as many as Meta's "
    "source has, else 1]",
)
@click.option(
    "--file_bytes",
    type=click.IntRange(1),
    help="Most bytes of a file, in Hugging Face's format.  [default: 5000000000]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the new weights.  [default: the source's; float32 for quantized GGUF]",
)
def convert(
    source: Path,
    target: Path,
    *,
    form: str,
    files: int | None,
    file_bytes: int | None,
    dtype: str | None,
) -> None:
    """Write the model at SOURCE to the folder TARGET in another format.

    Memory holds one weight at a time; the disk needs room for the largest new file twice. Started
    again after an interruption, it keeps the files that are finished. The new folder has checksums
    for `chasqui model verify`.
    """
    if files and form == "hf":
        raise click.UsageError("--files is for Meta's format; use --file_bytes")
    if file_bytes and form == "meta":
        raise click.UsageError("--file_bytes is for Hugging Face's format; use --files")
    arguments = ["convert", str(source), str(target), "--to", form]
    arguments += ["--file_bytes", str(file_bytes)] if file_bytes else []
    arguments += ["--files", str(files)] if files else []
    arguments += ["--dtype", dtype] if dtype else []
    _run_offline(*arguments)
    click.echo(f"{target}: written. Serve it: {_serving(source, target)}")


@model.command()
@click.option(
    "--ckpt_dir",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="The model: a folder in Meta's or Hugging Face's format, or a GGUF file.",
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
    command = ["quantize", "--ckpt_dir", str(ckpt_dir)]
    command += ["--output_dir", str(output_dir), "--quantize", quantization]
    _run_offline(*command)
    click.echo(f"{output_dir}: {quantization}. Serve it: chasqui serve --ckpt_dir {output_dir} …")


def _serving(source: Path, target: Path) -> str:
    """The command that serves a converted model, with a tokenizer that stayed at the source."""
    command = f"chasqui serve --ckpt_dir {target}"
    for path in (target, source):
        with contextlib.suppress(ModelFileError):
            find_tokenizer(path)
            return command if path == target else f"{command} --tokenizer_path {path}"
    return f"{command} --tokenizer_path …"


def _run_offline(*arguments: str) -> None:
    """Runs a program of `model_service.offline`; ends with its exit status unless that is 0."""
    if importlib.util.find_spec("psutil") is None:
        raise click.ClickException(
            "the packages that read models are not installed here: pip install '.[model]' in the "
            "source tree brings them"
        )
    command = [sys.executable, "-m", "model_service.offline", *arguments]
    status = subprocess.run(command, check=False).returncode  # noqa: S603  # our own module
    if status:
        sys.exit(status)
