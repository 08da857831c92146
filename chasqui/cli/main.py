"""The `chasqui` command. Exit status: 0 success, 1 failure (stderr says why), 2 wrong usage.

Flags have the names of Meta's parameters. A setting is also an environment variable, CHASQUI_ and
the name in capitals, with the same meaning for every command and service.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar, Unpack

import click
from click.core import ParameterSource

from chasqui.cli.chat import Conversation, print_choices, printed, refused_tags
from chasqui.cli.doctor.command import doctor
from chasqui.cli.keys import keys
from chasqui.cli.model.command import model
from chasqui.cli.serve.command import serve, summary
from chasqui.cli.serve.deployment import Deployment, deployment_of
from chasqui.cli.serve.supervisor import in_background
from chasqui.cli.status import status
from chasqui.flags import (
    access_settings,
    checkpoint_settings,
    one_line_errors,
    penalty_settings,
    priority_setting,
    setting,
    target_setting,
)
from chasqui.loadtest.command import bench
from client.connection.channel import Access
from client.errors import ConnectionSettingsError, UnreachableError
from client.requests import ChatOptions, TextOptions
from client.sync import Client

F = TypeVar("F", bound=Callable[..., object])


def sampling_settings(command: F) -> F:
    """The flags of model, sampling (as in `client.requests.Sampling`), priority and deadline."""
    settings = (
        setting("model", help="Fail unless the gateway serves this model.  [default: any]"),
        setting("temperature", type=float, help="Sampling temperature; 0 is greedy."),
        setting("top_p", type=float, help="Sample from the tokens of this probability mass."),
        setting("top_k", type=int, help="Sample from this many most probable tokens."),
        setting("min_p", type=float, help="Least probability, as a share of the best token's."),
        setting("max_gen_len", type=int, help="Most tokens of an answer."),
        setting("min_gen_len", type=int, help="Fewest tokens of an answer."),
        setting("seed", type=int, help="Seed that makes the answer repeatable."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        click.option(
            "--stop_token_ids",
            metavar="ID",
            type=int,
            multiple=True,
            help="Token that ends the answer; may be repeated.",
        ),
        penalty_settings,
        priority_setting,
        setting("timeout", type=float, help="Seconds an answer may take.  [default: no limit]"),
    )
    for each in reversed(settings):
        command = each(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chasqui-llama")
def main() -> None:
    """Llama 2 Chat as gRPC services: start them, talk to them, measure them."""
    # Invalid input reaches the check of the request, which names it; invalid output becomes "?".
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


main.add_command(model)
main.add_command(keys)


@main.command()
@target_setting
@setting("system", help="Instructions for the model.")
@click.option("--ask", metavar="TEXT", help="Ask one question, print the answer, and end.")
@click.option("--n", type=int, help="With --ask: print this many answers, each with the next seed.")
@click.option(
    "--serve",
    "start_services",
    is_flag=True,
    help="If nothing answers at the target, run all services on --ckpt_dir until the end of the "
    "chat, at a free port unless --target is given.",
)
@checkpoint_settings
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
    ckpt_dir: Path | None,
    tokenizer_path: Path | None,
    prompt_format: str | None,
    **options: Unpack[ChatOptions],
) -> None:
    """Talk to the model. Type /help in the chat for its commands."""
    if n is not None and ask is None:
        raise click.UsageError("--n needs --ask: a conversation continues from only one answer")
    if ask is None and sys.stdin is None:
        raise click.UsageError("there is no standard input to read questions from: use --ask")
    if not start_services:
        for flag in ("ckpt_dir", "tokenizer_path", "prompt_format"):
            if context.get_parameter_source(flag) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{flag} needs --serve: the target has its own model")
    with contextlib.ExitStack() as stack:
        if start_services and not _answers(target, access):
            is_default = context.get_parameter_source("target") is ParameterSource.DEFAULT
            checkpoint = deployment_of(ckpt_dir, tokenizer_path)
            deployment = replace(checkpoint, prompt_format=prompt_format)
            target = stack.enter_context(_services(deployment, None if is_default else target))
            access = Access()
        client = stack.enter_context(Client(target, tls=access.tls, api_key=access.api_key))
        if system and (tags := refused_tags(client, system)):
            problem = f"must not contain {' or '.join(tags)}, which no dialog may"
            raise click.BadParameter(problem, param_hint="--system")
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
@click.option("--echo", is_flag=True, help="Print TEXT before its continuation.")
@click.option("--n", type=int, help="Print this many continuations, each with the next seed.")
@sampling_settings
@access_settings
@one_line_errors()
def complete(
    text: str, *, target: str, access: Access, n: int | None, **options: Unpack[TextOptions]
) -> None:
    """Continue TEXT. The output can be appended to TEXT: it begins with a space if one is due."""
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
            raise  # a server answers, with other settings
        except UnreachableError:
            return False
    return True


@contextlib.contextmanager
def _services(deployment: Deployment, target: str | None) -> Iterator[str]:
    host, port = "127.0.0.1", "0"
    if target is not None:
        host, _, port = target.rpartition(":")
        if not (host and port.isdigit()):
            raise click.UsageError(f"--target must be host:port to serve there, not {target!r}")
    deployment = replace(deployment, host=host, port=int(port))
    name = deployment.model_name or deployment.ckpt_dir.name
    click.secho(f"starting the services with {name} …", err=True, dim=True)
    with in_background(deployment, log=lambda _name, _line: None) as address:
        yield address
