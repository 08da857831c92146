"""Imports gRPC so that its core keeps quiet.

The core writes a line to stderr for each TLS handshake that fails, which
`client.connection.diagnosis` tells better. It reads this variable once, when it is imported, and
other processes are not to inherit it.
"""

import os

_VARIABLE = "GRPC_VERBOSITY"

if _VARIABLE not in os.environ:
    os.environ[_VARIABLE] = "ERROR"
    import grpc  # noqa: F401

    del os.environ[_VARIABLE]
