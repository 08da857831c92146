"""`python -m model_service.offline COMMAND`: the programs behind `chasqui model` and the doctor.

Exit status: 0 fine, 1 something is wrong with the files, 2 wrong usage.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import serving
from serving.errors import StartError
from serving.telemetry.progress import progress

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m model_service.offline")
    commands = parser.add_subparsers(required=True)
    for add in (_add_inspect, _add_verify, _add_convert, _add_quantize, _add_machine):
        add(commands)
    given = parser.parse_args(arguments)
    # A name in a damaged file may be no text that can be printed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    command: Command = given.command
    try:
        # PyTorch and the libraries that read files belong to the extra.
        with serving.needs_extra("model"):
            status = command(given)
    except StartError as error:
        parser.exit(1, f"{error}\n")
    except OSError as error:  # such as a path that is too long
        reason = f"cannot be read or written: {error.strerror or error}"
        parser.exit(1, f"{str(error.filename)[:256]}: {reason}\n")
    sys.exit(status)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("inspect", help="describe a model by the headers of its files")
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokenizer_path", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.set_defaults(command=_inspect)


def _inspect(given: argparse.Namespace) -> int:
    from model_service.offline.inspection.report import as_document, as_text, inspect  # noqa: PLC0415

    found = inspect(given.path, given.tokenizer_path)
    print(json.dumps(as_document(found), default=str) if given.as_json else as_text(found))
    return 1 if found.problems else 0


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("verify", help="check that the files of a model are whole")
    parser.add_argument("path", type=Path)
    parser.set_defaults(command=_verify)


def _verify(given: argparse.Namespace) -> int:
    from model_service.offline.verification import (  # noqa: PLC0415
        files_to_verify,
        size_of,
        verify,
    )

    status = 0
    size = sum(map(size_of, files_to_verify(given.path)))
    with progress("verifying", size) as advance:
        for check in verify(given.path, advance):
            print(f"{'whole' if check.whole else 'wrong'}  {check.path}: {check.text}", flush=True)
            status |= not check.whole
    return status


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("convert", help="write a model in another format")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=["meta", "hf"], required=True)
    parser.add_argument("--files", type=int)
    parser.add_argument("--file_bytes", type=int, default=5 * 10**9)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.set_defaults(command=_convert)


def _convert(given: argparse.Namespace) -> int:
    from model_service.offline.conversion.convert import (  # noqa: PLC0415
        ConversionOptions,
        convert,
    )

    options = ConversionOptions(given.to, given.files, given.file_bytes, given.dtype)
    convert(given.source, given.target, options)
    return 0


def _add_quantize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("quantize", help="write a quantized checkpoint")
    parser.add_argument("--ckpt_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--quantize", choices=["int8", "int4", "fp8"], default="int8")
    parser.set_defaults(command=_quantize)


def _quantize(given: argparse.Namespace) -> int:
    from model_service.offline.quantize import quantize_checkpoint  # noqa: PLC0415

    quantize_checkpoint(given.ckpt_dir, given.output_dir, given.quantize)
    return 0


def _add_machine(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("machine", help="describe the machine as PyTorch sees it")
    parser.set_defaults(command=_machine)


def _machine(_given: argparse.Namespace) -> int:
    from model_service.offline.inspection.machine import describe_machine  # noqa: PLC0415

    print(json.dumps(describe_machine()))
    return 0


if __name__ == "__main__":
    main()
