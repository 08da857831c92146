"""The `chasqui` command. Exit status: 0 fine, 1 failed (stderr says why), 2 wrong usage.

Flags keep Meta's names. Settings have an environment variable, too, CHASQUI_ and the name in
capitals, which means the same to every command and service.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar, Unpack

import click
import grpc
from click.core import ParameterSource

from client.aio import AsyncClient
from client.channel import Access
from client.conversation import Conversation, print_choices, printed
from client.deployment import Deployment, demonstration
from client.errors import ChasquiError, ConnectionSettingsError, UnreachableError
from client.flags import (
    access_settings,
    one_line_errors,
    priority_setting,
    setting,
    target_setting,
)
from client.key_commands import keys
from client.load.command import bench
from client.model_commands import model
from client.requests import ChatOptions, TextOptions
from client.results import Model
from client.service_log import readable
from client.service_process import Log
from client.status_command import status
from client.supervisor import Supervisor, in_background
from client.sync import Client
from client.tags import special_tags

F = TypeVar("F", bound=Callable[..., object])


def sampling_settings(command: F) -> F:
    """The flags of `client.requests.Sampling` that a line can hold, priority and deadline."""
    settings = (
        setting("temperature", type=float, help="0 is greedy."),
        setting("top_p", type=float, help="Probability mass to sample from."),
        setting("top_k", type=int, help="Most probable tokens to sample from."),
        setting("min_p", type=float, help="Least probability, as a share of the best token's."),
        setting("max_gen_len", type=int, help="Most tokens of an answer."),
        setting("seed", type=int, help="Makes the answer repeatable."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        click.option(
            "--stop_token_ids",
            metavar="ID",
            type=int,
            multiple=True,
            help="Token that ends the answer; may be repeated.",
        ),
        setting("repetition_penalty", type=float, help="Above 1 discourages repetition."),
        setting("presence_penalty", type=float, help="Lowers tokens that the answer has."),
        setting("frequency_penalty", type=float, help="The same, for each time it has them."),
        priority_setting,
        setting("timeout", type=float, help="Seconds an answer may take.  [default: no limit]"),
    )
    for each in reversed(settings):
        command = each(command)
    return command


def _instructions(_context: click.Context, _flag: click.Parameter, value: str | None) -> str | None:
    if tags := special_tags(value or ""):
        raise click.BadParameter(f"must not hold {' or '.join(tags)}: no dialog may")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chasqui-llama")
def main() -> None:
    """Llama 2 Chat as gRPC services: start them, talk to them."""
    # Text that is not valid here is for the request's check to refuse, or shown as "?".
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


main.add_command(model)
main.add_command(keys)


@main.command()
@setting(
    "ckpt_dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a checkpoint in Meta's format.  [default: the demonstration checkpoint]",
)
@setting(
    "tokenizer_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The checkpoint's tokenizer.model.",
)
@setting("model_name", help="Name that clients see.  [default: the folder's]")
@setting("shards", type=click.IntRange(1), default=1, help="Processes to cut the model over.")
@setting("replicas", type=click.IntRange(1), default=1, help="Copies of the model to run.")
@setting("host", default="127.0.0.1", show_default=True, help="Address for the gateway.")
@setting(
    "port",
    type=click.IntRange(0, 65535),
    default=50051,
    show_default=True,
    help="Port for the gateway; 0: any that is free.",
)
@setting("max_seq_len", type=int, help="Most tokens of prompt and answer.  [default: 512]")
@setting("max_batch_size", type=int, help="Most sequences that run at once.  [default: 8]")
@setting("dtype", help="auto, float32, bfloat16 or float16.")
@setting("quantize", help="auto, none, int8, int4 or fp8.")
@setting("device", help="auto, cpu or cuda.")
@setting(
    "safety",
    is_flag=True,
    help="Have a safety service judge dialogs and answers, by the rules that come with it.",
)
@setting(
    "log_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the services' logs go.  [default: stderr]",
)
@one_line_errors()
def serve(
    *,
    ckpt_dir: Path | None,
    tokenizer_path: Path | None,
    model_name: str | None,
    shards: int,
    replicas: int,
    host: str,
    port: int,
    safety: bool,
    log_file: Path | None,
    **model_settings: object,
) -> None:
    """Run all services on this machine until Ctrl-C."""
    if ckpt_dir is not None and tokenizer_path is not None:
        checkpoint = Deployment(ckpt_dir, tokenizer_path)
    elif ckpt_dir is None and tokenizer_path is None:
        checkpoint = demonstration()
    else:
        raise click.UsageError("--ckpt_dir and --tokenizer_path belong together: give both")
    deployment = replace(
        checkpoint,
        model_name=model_name or checkpoint.model_name,
        shards=shards,
        replicas=replicas,
        host=host,
        port=port,
        safety=safety,
        model_settings=model_settings,
    )
    with _log_to(log_file) as log:
        asyncio.run(_serve_until_stopped(Supervisor(deployment, log)))


@main.command()
@target_setting
@setting("system", callback=_instructions, help="Instructions for the model.")
@click.option("--ask", metavar="TEXT", help="Ask this, print the answer, leave.")
@click.option(
    "--n", type=int, help="With --ask: print so many answers, the seed of each counted up."
)
@click.option(
    "--serve",
    "start_services",
    is_flag=True,
    help="If nothing answers at the target, run all services on the demonstration checkpoint "
    "meanwhile: at a free port, unless --target names one.",
)
@sampling_settings
@access_settings
@click.pass_context
@one_line_errors()
def chat(
    context: click.Context,
    /,
    *,
    target: str,
    access: Access,
    system: str | None,
    ask: str | None,
    n: int | None,
    start_services: bool,
    **options: Unpack[ChatOptions],
) -> None:
    """Talk to the model. /help lists what else one may type."""
    if n is not None and ask is None:
        raise click.UsageError("--n needs --ask: a conversation goes on from one answer")
    if ask is None and sys.stdin is None:
        raise click.UsageError("standard input is closed, and questions come from there: use --ask")
    with contextlib.ExitStack() as stack:
        if start_services and not _answers(target, access):
            is_default = context.get_parameter_source("target") is ParameterSource.DEFAULT
            target = stack.enter_context(_demonstration_services(None if is_default else target))
            access = Access()
        client = stack.enter_context(Client(target, tls=access.tls, api_key=access.api_key))
        conversation = Conversation(client, options, system)
        if ask is not None:
            if n is None:
                conversation.ask(ask)
            else:
                conversation.ask_for_choices(ask, n)
            return
        if sys.stdin.isatty():
            click.secho(f"{_summary(client.get_model())}. /help lists commands.", dim=True)
        conversation.run()


@main.command()
@click.argument("text")
@target_setting
@click.option("--echo", is_flag=True, help="Print the text in front of its continuation.")
@click.option("--n", type=int, help="Print so many continuations, the seed of each counted up.")
@sampling_settings
@access_settings
@one_line_errors()
def complete(
    text: str, *, target: str, access: Access, n: int | None, **options: Unpack[TextOptions]
) -> None:
    """Continue TEXT. The continuation begins with the space that belongs behind TEXT, if any."""
    options["exact_continuation"] = True
    with (
        Client(target, tls=access.tls, api_key=access.api_key) as client,
        contextlib.closing(client.complete_stream(text, n=n, **options)) as stream,
    ):
        if n is not None:
            print_choices(stream, n)
            return
        for _event in printed(stream):
            pass


main.add_command(bench)
main.add_command(status)


async def _serve_until_stopped(services: Supervisor) -> None:
    serving = asyncio.create_task(_serve(services))

    def on_signal() -> None:
        # The first one lets running requests finish, a second one does not.
        if not serving.cancel():
            services.hurry()

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, on_signal)
    await asyncio.wait({serving})
    await services.stop()
    if not serving.cancelled():
        await serving  # raises why a service ended


async def _serve(services: Supervisor) -> None:
    address = await services.start()
    async with AsyncClient(address) as client:
        try:
            click.echo(_summary(await client.get_model()))
        except ChasquiError as error:
            # With CHASQUI_API_KEYS it serves those who have one.
            if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
    click.echo(f"Serving at {address}. Talk: chasqui chat --target {address}. Stop: Ctrl-C.")
    await services.watch()


def _answers(target: str, access: Access) -> bool:
    with Client(target, tls=access.tls, api_key=access.api_key) as client:
        try:
            client.get_model()
        except ConnectionSettingsError:
            raise  # something is there
        except UnreachableError:
            return False
    return True


@contextlib.contextmanager
def _demonstration_services(target: str | None) -> Iterator[str]:
    host, port = "127.0.0.1", "0"
    if target is not None:
        host, _, port = target.rpartition(":")
        if not (host and port.isdigit()):
            raise click.UsageError(f"--target must be host:port to serve there, not {target!r}")
    deployment = replace(demonstration(), host=host, port=int(port))
    click.secho("starting the services on the demonstration checkpoint …", err=True, dim=True)
    with in_background(deployment, log=lambda _name, _line: None) as address:
        yield address


@contextlib.contextmanager
def _log_to(path: Path | None) -> Iterator[Log]:
    """Where the lines of the services go: readable on a terminal, as they are elsewhere."""
    with contextlib.ExitStack() as stack:
        stream = (
            sys.stderr if path is None else stack.enter_context(path.open("a", encoding="utf-8"))
        )
        shown = readable if stream is not None and stream.isatty() else str
        yield lambda name, line: click.echo(f"{name} | {shown(line)}", file=stream, err=True)


def _summary(model: Model) -> str:
    size = (
        f"{model.parameters / 1e6:.1f}M"
        if model.parameters < 1e9
        else f"{model.parameters / 1e9:.1f}B"
    )
    shards = "1 shard" if model.shards == 1 else f"{model.shards} shards"
    return (
        f"{model.name}: {size} parameters, {model.dtype}, {shards}, "
        f"context of {model.context_length} tokens"
    )
