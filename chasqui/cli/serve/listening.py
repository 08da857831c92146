"""Whether a server can listen on an address."""

import socket


def why_taken(host: str, port: int) -> str | None:
    """The system's reason for which no server can listen there; None if one can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As gRPC does: connections that were closed lately do not keep the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
