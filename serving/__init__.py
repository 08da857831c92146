"""Shared by all four services: server, settings, errors, telemetry, security.

Import it before `grpc`, which reads the variable set here when it is imported.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

# At its own level INFO, gRPC's core writes a line to stderr for each failed handshake, so that any
# client that can connect could fill the disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """For a service's imports: if a package is missing, names the extra that installs it.

    Ends the process with status 1 and one line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or importlib.util.find_spec(error.name.partition(".")[0]):
            raise
        raise SystemExit(
            f"the package {error.name} is not installed: pip install '.[{name}]' in the project's "
            "folder installs what this service needs"
        ) from None
