"""Imports gRPC with its log level at ERROR.

At the default level gRPC's core writes a line to stderr for each TLS handshake that fails;
`client.connection.diagnosis` explains those failures better. The core reads the variable once, at
import, and child processes must not inherit it.
"""

import os

_VARIABLE = "GRPC_VERBOSITY"

if _VARIABLE not in os.environ:
    os.environ[_VARIABLE] = "ERROR"
    import grpc  # noqa: F401

    del os.environ[_VARIABLE]
