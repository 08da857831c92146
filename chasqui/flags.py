"""Flags of the `chasqui` command that several modules share, and how it shows an error."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from chasqui.errors import SupervisorError
from client.connection import targets
from client.connection.channel import DEFAULT_TARGET, Access, Tls, check_key
from client.errors import ChasquiError, ConnectionSettingsError, UnreachableError

F = TypeVar("F", bound=Callable[..., object])


def setting(name: str, **attributes: Any) -> Callable[[F], F]:  # noqa: ANN401
    """A flag with its environment variable; --help shows both."""
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

priority_setting = setting(
    "priority",
    type=int,
    help="Higher goes first when requests wait, -100 to 100.  [default: 0]",
)

# Not a flag: a command line is for all users of the machine to read.
API_KEY_VARIABLE = "CHASQUI_API_KEY"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def access_settings(command: Callable[..., object]) -> Callable[..., object]:
    """The flags for a gateway that is not open to everybody; the command gets them as `access`."""

    @functools.wraps(command)
    def with_access(*args: object, **flags: Any) -> object:  # noqa: ANN401
        names = ("tls", "ca", "client_cert", "client_key", "tls_name", "api_key_file")
        access = _access(**{name: flags.pop(name) for name in names})
        return command(*args, access=access, **flags)

    settings = (
        setting("tls", is_flag=True, help="Talk TLS, and trust the public authorities."),
        setting("ca", type=_FILE, help="Talk TLS, and trust the authorities in this PEM file."),
        setting("client_cert", type=_FILE, help="PEM file of the certificate to show."),
        setting("client_key", type=_FILE, help="PEM file of its private key."),
        setting("tls_name", help="Name the gateway's certificate must have.  [default: the host]"),
        setting(
            "api_key_file",
            type=_FILE,
            help=f"File with the API key, for want of {API_KEY_VARIABLE}.",
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
    """An error goes to stderr without a traceback, and the exit status is 1."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has left: click ends the command silently
    except ConnectionSettingsError as error:
        raise click.ClickException(str(error)) from error
    except UnreachableError as error:
        advice = "Start the services with `chasqui serve`, or name another address with --target."
        raise click.ClickException(f"{error}. {advice}") from error
    except (ChasquiError, SupervisorError, OSError) as error:
        raise click.ClickException(str(error)) from error
