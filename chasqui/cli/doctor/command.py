"""`chasqui doctor`: one line for each part of the set-up."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from chasqui.cli.doctor.files import ModelProbe
from chasqui.cli.doctor.finding import Finding, Verdict
from chasqui.cli.doctor.machine import MachineProbe
from chasqui.cli.doctor.packages import check_extras, check_python
from chasqui.cli.doctor.ports import check_ports
from chasqui.cli.serve.deployment import DEFAULT_HTTP_PORT, demonstration
from chasqui.flags import one_line_errors, setting


@click.command()
@setting(
    "ckpt_dir",
    type=click.Path(path_type=Path),
    help="The model to serve.  [default: the demonstration checkpoint]",
)
@setting(
    "tokenizer_path",
    type=click.Path(path_type=Path),
    help="The model's tokenizer.  [default: the one beside the weights]",
)
@setting("host", default="127.0.0.1", show_default=True, help="Address of the gateway.")
@setting(
    "port",
    type=click.IntRange(1, 65535),
    default=50051,
    show_default=True,
    help="Port of the gateway.",
)
@setting(
    "http_port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_HTTP_PORT,
    show_default=True,
    help="Port of the gateway for OpenAI's API over HTTP; 0: none.",
)
@one_line_errors()
def doctor(
    *, ckpt_dir: Path | None, tokenizer_path: Path | None, host: str, port: int, http_port: int
) -> None:
    """Check whether this machine can serve the model, and say what to do if not.

    Looks at Python, packages, processor, CUDA, memory, ports and the model's files. Exit status: 1
    if something is wrong.
    """
    status = 0
    for finding in _findings(ckpt_dir, tokenizer_path, check_ports(host, port, http_port)):
        colour = {Verdict.FINE: None, Verdict.NOTE: "yellow", Verdict.WRONG: "red"}
        click.secho(str(finding), fg=colour[finding.verdict])
        status |= finding.verdict is Verdict.WRONG
    sys.exit(status)


def _findings(
    ckpt_dir: Path | None, tokenizer_path: Path | None, ports: Iterator[Finding]
) -> Iterator[Finding]:
    # Both processes start first, and run beside the quick checks.
    machine = MachineProbe()
    model = ModelProbe(ckpt_dir or demonstration().ckpt_dir, tokenizer_path)
    yield check_python()
    yield from check_extras()
    yield from ports
    yield from machine.findings()
    yield from model.findings()
