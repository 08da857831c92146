"""What the modules of the `chasqui` command share: flags, and how an error is shown."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from client.channel import DEFAULT_TARGET
from client.errors import ChasquiError, UnreachableError
from client.supervisor import SupervisorError

F = TypeVar("F", bound=Callable[..., object])


def setting(name: str, **attributes: Any) -> Callable[[F], F]:  # noqa: ANN401
    """A flag with its environment variable; --help shows both."""
    variable = f"CHASQUI_{name.upper()}"
    return click.option(f"--{name}", envvar=variable, show_envvar=True, **attributes)


target_setting = setting(
    "target", default=DEFAULT_TARGET, show_default=True, help="Address of the gateway, host:port."
)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What went wrong goes to stderr without a traceback, and the exit status is 1."""
    try:
        yield
    except UnreachableError as error:
        advice = "Start the services with `chasqui serve`, or name another address with --target."
        raise click.ClickException(f"{error}. {advice}") from error
    except (ChasquiError, SupervisorError, OSError) as error:
        raise click.ClickException(str(error)) from error
