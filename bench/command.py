"""The flags that the benchmarks have in common, and the end of each command."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from bench.report import Recorder

RESULTS = Path(__file__).parent / "results"
WORK_DIR = Path.home() / ".cache" / "chasqui-bench"


def command_parser(
    name: str, description: str | None, *, default_device: str | None = None
) -> ArgumentParser:
    """The parser of `python -m bench.<name>`; without a device the command has no work folder."""
    parser = ArgumentParser(
        f"python -m bench.{name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of all results")
    if default_device:
        devices = ["cuda", "cpu"]
        add("--device", choices=devices, default=default_device, help=f"default: {default_device}")
        add("--work_dir", type=Path, default=WORK_DIR, help="keeps checkpoints, exports, …")
    return parser


def finish(*recorders: Recorder) -> None:
    """Names the results. Exit status 1 if a case failed."""
    for recorder in recorders:
        print(recorder.folder / "result.md")
    if any(recorder.failed for recorder in recorders):
        raise SystemExit(1)
