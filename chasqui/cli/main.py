"""The `chasqui` command. Exit status: 0 fine, 1 failed (stderr says why), 2 wrong usage.

Flags keep Meta's names. Settings have an environment variable, too, CHASQUI_ and the name in
capitals, which means the same to every command and service.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from typing import TypeVar, Unpack

import click
from click.core import ParameterSource

from chasqui.cli.chat import Conversation, print_choices, printed
from chasqui.cli.doctor.command import doctor
from chasqui.cli.keys import keys
from chasqui.cli.model.command import model
from chasqui.cli.serve.command import serve, summary
from chasqui.cli.serve.deployment import demonstration
from chasqui.cli.serve.supervisor import in_background
from chasqui.cli.status import status
from chasqui.flags import (
    access_settings,
    one_line_errors,
    priority_setting,
    setting,
    target_setting,
)
from chasqui.loadtest.command import bench
from client.connection.channel import Access
from client.errors import ConnectionSettingsError, UnreachableError
from client.requests import ChatOptions, TextOptions
from client.sync import Client
from llama.prompt_format.tags import special_tags

F = TypeVar("F", bound=Callable[..., object])


def sampling_settings(command: F) -> F:
    """The flags of `client.requests.Sampling` that a line can hold, priority and deadline."""
    settings = (
        setting("temperature", type=float, help="0 is greedy."),
        setting("top_p", type=float, help="Probability mass to sample from."),
        setting("top_k", type=int, help="Most probable tokens to sample from."),
        setting("min_p", type=float, help="Least probability, as a share of the best token's."),
        setting("max_gen_len", type=int, help="Most tokens of an answer."),
        setting("min_gen_len", type=int, help="Fewest tokens of an answer."),
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
            click.secho(f"{summary(client.get_model())}. /help lists commands.", dim=True)
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


main.add_command(serve)
main.add_command(bench)
main.add_command(status)
main.add_command(doctor)


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
