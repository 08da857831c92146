"""Flags that several subcommands of `chasqui` share, and the texts of their errors."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from chasqui.errors import SupervisorError
from client.connection import targets
from client.connection.channel import DEFAULT_TARGET, Access, Tls, check_key
from client.errors import (
    ChasquiError,
    ConnectionSettingsError,
    StreamLostError,
    UnreachableError,
)
from llama.prompt_format.recognition import FormatName

F = TypeVar("F", bound=Callable[..., object])


def setting(name: str, **attributes: Any) -> Callable[[F], F]:  # noqa: ANN401
    """A flag and its environment variable CHASQUI_NAME; --help shows both."""
    variable = f"CHASQUI_{name.upper()}"
    return click.option(f"--{name}", envvar=variable, show_envvar=True, **attributes)


def _target(_context: click.Context, _flag: click.Parameter, value: str) -> str:
    try:
        targets.addresses(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


target_setting = setting(
    "target",
    default=DEFAULT_TARGET,
    show_default=True,
    callback=_target,
    help="Address of the gateway, host:port.",
)


def checkpoint_settings(command: F) -> F:
    """The flags that say which model to serve."""
    settings = (
        setting(
            "ckpt_dir",
            type=click.Path(exists=True, path_type=Path),
            help="Folder of a checkpoint in Meta's or Hugging Face's format, or a GGUF file.  "
            "[default: the demonstration checkpoint]",
        ),
        setting(
            "tokenizer_path",
            type=click.Path(exists=True, path_type=Path),
            help="Its tokenizer.model, tokenizer.json or GGUF file.  [default: that in --ckpt_dir]",
        ),
        setting(
            "prompt_format",
            type=click.Choice(get_args(FormatName)),
            help="Format of prompts; auto is that of the model's chat template.  [default: auto]",
        ),
    )
    for each in reversed(settings):
        command = each(command)
    return command


priority_setting = setting(
    "priority",
    type=int,
    help="Waiting requests run by priority, highest first: -100 to 100.  [default: 0]",
)


def penalty_settings(command: F) -> F:
    """The flags of penalties on tokens that the text has."""
    settings = (
        setting("repetition_penalty", type=float, help="Above 1: lowers all earlier tokens."),
        setting("presence_penalty", type=float, help="Above 0: lowers tokens that the answer has."),
        setting("frequency_penalty", type=float, help="The same, for each time a token occurs."),
    )
    for each in reversed(settings):
        command = each(command)
    return command


# Not a flag, because all users of the machine can read a command line.
API_KEY_VARIABLE = "CHASQUI_API_KEY"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def access_settings(command: Callable[..., object]) -> Callable[..., object]:
    """The flags for TLS and the API key; the command gets them together, as `access`."""

    @functools.wraps(command)
    def with_access(*args: object, **flags: Any) -> object:  # noqa: ANN401
        names = ("tls", "ca", "client_cert", "client_key", "tls_name", "api_key_file")
        access = _access(**{name: flags.pop(name) for name in names})
        return command(*args, access=access, **flags)

    settings = (
        setting("tls", is_flag=True, help="Connect over TLS, and trust the public authorities."),
        setting("ca", type=_FILE, help="Connect over TLS, and trust the authorities in this file."),
        setting("client_cert", type=_FILE, help="PEM file of the client certificate."),
        setting("client_key", type=_FILE, help="PEM file of its private key."),
        setting(
            "tls_name", help="Name that the gateway's certificate must have.  [default: the host]"
        ),
        setting(
            "api_key_file",
            type=_FILE,
            help=f"File that contains only the API key.  [default: the key in {API_KEY_VARIABLE}]",
        ),
    )
    for each in reversed(settings):
        with_access = each(with_access)
    return with_access


def _access(
    *,
    tls: bool,
    ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
    tls_name: str | None,
    api_key_file: Path | None,
) -> Access:
    if (client_cert is None) != (client_key is None):
        raise click.UsageError("--client_cert and --client_key belong together: give both")
    if not (tls or ca) and (client_cert or tls_name):
        raise click.UsageError("--client_cert, --client_key and --tls_name need --tls or --ca")
    api_key = os.environ.get(API_KEY_VARIABLE) or None
    if api_key_file is not None:
        api_key = api_key_file.read_text("utf-8").strip()
    encryption = Tls(ca, client_cert, client_key, tls_name) if tls or ca else None
    try:
        if api_key is not None:
            check_key(api_key)
        if encryption is not None:
            encryption.context()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return Access(encryption, api_key)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Shows an error on stderr without a traceback; the exit status is 1."""
    try:
        yield
    except BrokenPipeError:
        raise  # the output is no longer read: click ends the command silently
    except (ChasquiError, SupervisorError, OSError) as error:
        raise click.ClickException(with_advice(error)) from error


def with_advice(error: Exception) -> str:
    """The text of an error; if nothing answers at the target, with what to do about it."""
    cause = error.__cause__ if isinstance(error, StreamLostError) else error
    if isinstance(cause, UnreachableError) and not isinstance(cause, ConnectionSettingsError):
        advice = "Start the services with `chasqui serve`, or name another address with --target."
        return f"{error}. {advice}"
    return str(error)
