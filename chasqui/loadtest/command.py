"""`chasqui bench`: reads the flags, runs the measurement, prints and saves the results.

All flags are checked before the first request is sent, because a run may take hours.
"""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import click

from chasqui.flags import (
    access_settings,
    one_line_errors,
    penalty_settings,
    priority_setting,
    setting,
    target_setting,
)
from chasqui.loadtest import lengths, plot, report
from chasqui.loadtest.generator import Closed, Open, Until
from chasqui.loadtest.lengths import Lengths
from chasqui.loadtest.measurement import Plan, measure
from chasqui.loadtest.workload import SEEDS, Workload, read_dialogs
from client.arguments import seconds
from client.connection.channel import Access
from client.requests import Dialog, Sampling
from client.sync import Client

DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS = 100

T = TypeVar("T")
S = TypeVar("S")


def _checked(read: Callable[[S], T]) -> Callable[..., T | None]:
    """The callback of a flag: `read` converts its value, and raises ValueError if it is invalid."""

    def callback(_context: click.Context, _flag: click.Parameter, value: S | None) -> T | None:
        try:
            return None if value is None else read(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _output(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    return path


def _picture(path: Path) -> Path:
    if path.suffix not in plot.FORMATS:
        raise ValueError(f"must end with {', '.join(plot.FORMATS)}, not {path.suffix!r}")
    return _output(path)


POSITIVE = click.FloatRange(min=0, min_open=True)
FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@target_setting
@setting(
    "concurrency",
    type=click.IntRange(1),
    help=f"Closed loop: requests in progress at once.  [default: {DEFAULT_CONCURRENCY}]",
)
@setting(
    "rate",
    type=POSITIVE,
    callback=_checked(_finite),
    help="Open loop instead: requests per second, however slow the answers are.",
)
@setting(
    "requests",
    type=click.IntRange(1),
    help=f"Requests to send.  [default: {DEFAULT_REQUESTS}; with --duration: no limit]",
)
@setting("duration", type=POSITIVE, callback=_checked(seconds), help="Seconds to send.")
@setting(
    "warmup",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Requests to send first, which are not measured.",
)
@setting(
    "prompt_tokens",
    default="128",
    show_default=True,
    callback=_checked(lengths.parse),
    help=f"Length of prompts: {lengths.FORMS}.",
)
@setting(
    "answer_tokens",
    default="64",
    show_default=True,
    callback=_checked(lengths.parse),
    help="Length of answers, in the same forms.",
)
@setting(
    "shared_prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Tokens at the beginning that all prompts have in common.",
)
@setting(
    "dialogs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_checked(read_dialogs),
    help="JSON lines file of dialogs to send instead of random prompts.",
)
@setting(
    "seed",
    type=click.IntRange(0, SEEDS - 1),
    default=0,
    show_default=True,
    help="Seed that makes lengths, prompts, arrival times and answers repeatable.",
)
@setting(
    "temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 is greedy.",
)
@setting("top_p", type=float, help="Sample from the tokens of this probability mass.")
@setting("top_k", type=int, help="Sample from this many most probable tokens.")
@penalty_settings
@priority_setting
@setting("timeout", type=POSITIVE, callback=_checked(seconds), help="Seconds an answer may take.")
@setting(
    "connections",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Connections, which the requests use in turn.",
)
@click.option(
    "--json",
    "json_file",
    type=FILE,
    callback=_checked(_output),
    help="Write all results to this file, as JSON.",
)
@click.option(
    "--plot",
    "plot_file",
    type=FILE,
    callback=_checked(_picture),
    help="Draw latencies and throughput into this file: PNG, PDF or SVG.",
)
@access_settings
@one_line_errors()
def bench(
    *,
    target: str,
    access: Access,
    concurrency: int | None,
    rate: float | None,
    requests: int | None,
    duration: float | None,
    warmup: int,
    prompt_tokens: Lengths,
    answer_tokens: Lengths,
    shared_prefix: int,
    dialogs: Sequence[Dialog] | None,
    seed: int,
    timeout: float | None,
    connections: int,
    json_file: Path | None,
    plot_file: Path | None,
    **sampling: float | None,
) -> None:
    """Measure throughput and latency of a gateway under load.

    docs/clients/bench.md explains each number.
    """
    if concurrency is not None and rate is not None:
        raise click.UsageError("--concurrency is a closed loop and --rate an open one: give one")
    if dialogs and shared_prefix:
        raise click.UsageError("--shared_prefix is for random prompts: leave it out with --dialogs")
    if plot_file is not None and not plot.available():
        raise click.ClickException(
            "--plot needs matplotlib: run pip install '.[bench]' in the source tree"
        )
    if requests is None and duration is None:
        requests = DEFAULT_REQUESTS
    if rate is None and concurrency is None:
        concurrency = DEFAULT_CONCURRENCY
    options = cast("Sampling", sampling)
    plan = Plan(
        target=target,
        loop=Closed(concurrency) if concurrency is not None else Open(cast("float", rate), seed),
        until=Until(requests, duration),
        warmup=warmup,
        workload=Workload(
            prompt_tokens, answer_tokens, shared_prefix, dialogs or (), options, seed
        ),
        timeout=timeout,
        connections=connections,
    )
    with Client(target, tls=access.tls, api_key=access.api_key) as client:
        model = client.get_model()
    click.echo(report.headline(plan, model))
    measurement = asyncio.run(measure(plan, model, access))
    if measurement is None:
        raise click.ClickException("stopped before anything was measured")
    click.echo(report.table(measurement))
    if json_file is not None:
        written = json.dumps(report.document(measurement), allow_nan=False)
        json_file.write_text(written, encoding="utf-8")
    if plot_file is not None:
        plot.save(measurement, plot_file)
    if not measurement.summary.succeeded:
        raise click.ClickException(f"none of {len(measurement.run.records)} requests succeeded")
