"""`chasqui status`: a gateway's replicas, load and health, as a table or as JSON."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from enum import Enum

import click

from chasqui.flags import (
    access_settings,
    one_line_errors,
    setting,
    target_setting,
    with_advice,
)
from client.connection.channel import Access
from client.errors import ChasquiError, DeadlineExceededError, InvalidRequestError
from client.status import GatewayStatus, ReplicaStatus, Upstream
from client.sync import Client

TIMEOUT = 10.0  # seconds
INTERVAL = 2.0  # seconds between two requests of --watch
NOTHING = "–"


@click.command()
@target_setting
@access_settings
@click.option("--watch", is_flag=True, help=f"Repeat every {INTERVAL:g} seconds, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
@setting(
    "timeout",
    type=float,
    default=TIMEOUT,
    show_default=True,
    help="Seconds that the gateway has to answer.",
)
@one_line_errors()
def status(*, target: str, access: Access, watch: bool, as_json: bool, timeout: float) -> None:
    """Show a gateway's replicas, load and health.

    Exit status: 0 if the gateway serves, 1 if not.
    """
    show = _watch if watch else _show
    with Client(target, tls=access.tls, api_key=access.api_key) as client:
        serving = show(client, timeout, as_json=as_json)
    sys.exit(0 if serving else 1)


def _show(client: Client, timeout: float, *, as_json: bool) -> bool:
    try:
        found = client.get_status(timeout=timeout)
    except DeadlineExceededError as error:
        raise DeadlineExceededError(
            f"the gateway at {client.target} did not send its status within {timeout:g} seconds, "
            "the --timeout of this command",
            error.request_id,
        ) from error
    click.echo(_document(found) if as_json else table(client.target, found))
    return found.serving


def _watch(client: Client, timeout: float, *, as_json: bool) -> bool:
    """Shows the status until Ctrl-C, errors included; returns whether the last one was serving."""
    serving = False
    try:
        while True:
            if not as_json:
                click.clear()  # has no effect unless stdout is a terminal
            try:
                serving = _show(client, timeout, as_json=as_json)
            except InvalidRequestError:
                raise
            except ChasquiError as error:
                serving = False
                click.echo(with_advice(error), err=as_json)
            time.sleep(INTERVAL)
    except KeyboardInterrupt:
        return serving


def table(target: str, found: GatewayStatus) -> str:
    """The status as text; `target` is the gateway's address."""
    return "\n".join(_lines(target, found))


def _lines(target: str, found: GatewayStatus) -> Iterator[str]:
    state = "serving" if found.serving else "not serving"
    yield f"gateway    {target}  {state}, up {_duration(found.uptime)}"
    yield (
        f"           {found.running_sequences:,} running, {found.queued_sequences:,} queued, "
        f"{found.detached_streams:,} detached, {found.displaced_sequences:,} displaced"
    )
    yield f"tokenizer  {found.tokenizer.target}  {_state(found.tokenizer)}"
    if found.safety:
        yield f"safety     {found.safety.target}  {_state(found.safety)}"
    yield ""
    if found.replicas:
        yield from _aligned([_HEADS, *map(_cells, found.replicas)])
    else:
        yield "no replica is configured or found in DNS"
    upstreams = [found.tokenizer, found.safety, *(replica.upstream for replica in found.replicas)]
    reasons = [
        f"{upstream.target}: {upstream.reason}"
        for upstream in upstreams
        if upstream and upstream.reason
    ]
    if reasons:
        yield from ("", *reasons)


_HEADS = (
    *("replica", "state", "model", "running", "waiting"),
    *("blocks used", "cached", "from here", "tokens to compute", "reported"),
)


def _cells(replica: ReplicaStatus) -> Sequence[str]:
    info, load, age = replica.info, replica.load, replica.load_age
    return (
        replica.upstream.target,
        _state(replica.upstream),
        NOTHING if info is None else info.name,
        NOTHING if load is None else f"{load.running_sequences:,}",
        NOTHING if load is None else f"{load.waiting_sequences:,}",
        NOTHING if load is None else f"{load.total_blocks - load.free_blocks}/{load.total_blocks}",
        NOTHING if load is None else f"{load.cached_blocks}",
        f"{replica.running_sequences:,}",
        f"{replica.outstanding_tokens:,}",
        NOTHING if age is None else f"{age.total_seconds():.1f} s ago",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows as lines with columns: names left-aligned, numbers right-aligned."""
    named = _HEADS.index("running")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if number < named else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _state(upstream: Upstream) -> str:
    return upstream.state.name.lower().replace("_", " ")


def _duration(length: timedelta) -> str:
    minutes, seconds = divmod(int(length.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown[:2]) or "0 s"


def _document(found: GatewayStatus) -> str:
    return json.dumps(asdict(found), default=_plain)


def _plain(value: object) -> object:
    """A value in JSON's types: a state by its name, a duration in seconds."""
    match value:
        case Enum():
            return value.name
        case timedelta():
            return value.total_seconds()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
