"""`chasqui keys`: API keys for a gateway's file."""

import hashlib
import re
import secrets

import click


@click.group()
def keys() -> None:
    """API keys of a gateway."""


@keys.command()
@click.option("--name", required=True, help="Whose key it is: letters, digits, '.', '_', '-'.")
@click.option(
    "--permission",
    "permissions",
    type=click.Choice(["generate", "operate"]),
    multiple=True,
    default=("generate",),
    show_default=True,
    help="a permission of the key; can be repeated",
)
def new(name: str, permissions: tuple[str, ...]) -> None:
    """Make a key: print it, once, and the entry for the file given as --api_keys."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise click.BadParameter(
            "must be 1 to 64 letters, digits, '.', '_' or '-'", param_hint="--name"
        )
    key = f"chasqui-{secrets.token_urlsafe(32)}"
    listed = ", ".join(f'"{permission}"' for permission in sorted(set(permissions)))
    click.echo(
        f"{key}\n\n"
        "is the key; nothing keeps it. Its entry, which cannot be turned back into it:\n\n"
        f"[[keys]]\n"
        f'name = "{name}"\n'
        f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        f"permissions = [{listed}]"
    )
