"""`chasqui keys`: makes API keys and their entries for a gateway's file."""

import hashlib
import re
import secrets

import click

from chasqui.flags import API_KEY_VARIABLE


@click.group()
def keys() -> None:
    """Make API keys."""


@keys.command()
@click.option(
    "--name",
    required=True,
    help="Caller's name in logs and metrics: letters, digits, '.', '_', '-'.",
)
@click.option(
    "--permission",
    "permissions",
    type=click.Choice(["generate", "operate"]),
    multiple=True,
    default=("generate",),
    show_default=True,
    help="A permission of the key; may be repeated.",
)
def new(name: str, permissions: tuple[str, ...]) -> None:
    """Make a key: print it, and its entry for the gateway's file of keys (--api_keys)."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise click.BadParameter(
            "must be 1 to 64 letters, digits, '.', '_' or '-'", param_hint="--name"
        )
    key = f"chasqui-{secrets.token_urlsafe(32)}"
    listed = ", ".join(f'"{permission}"' for permission in sorted(set(permissions)))
    click.echo(
        f"{key}\n\n"
        "# The line above is the key, which is not shown again. The caller needs it, in the\n"
        f"# variable {API_KEY_VARIABLE} or alone in a file for --api_key_file. Append the lines\n"
        "# below to the gateway's file, --api_keys: they contain only a digest of the key.\n"
        f"[[keys]]\n"
        f'name = "{name}"\n'
        f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        f"permissions = [{listed}]"
    )
