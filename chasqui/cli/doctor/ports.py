"""Checks whether the default ports of the services are free."""

import socket
from collections.abc import Iterator
from contextlib import suppress

from chasqui.cli.doctor.finding import Finding, fine, remark, wrong
from chasqui.cli.serve.listening import why_taken

# The ports of services that are started one by one; `chasqui serve` lets the system choose them.
SINGLE_SERVICES = {50052: "tokenizer service", 50053: "model service", 50054: "safety service"}


def check_ports(host: str, port: int, http_port: int) -> Iterator[Finding]:
    """The gateway's two ports, and those of services that are started one by one.

    With `http_port` 0 the gateway has no port for HTTP.
    """
    yield _gateway_port(host, port, "gateway", "--port")
    if http_port == port:
        free = _free_port(host)
        text = f"{port} is named twice, for gRPC (--port) and for HTTP (--http_port)"
        yield wrong("port", text, f"choose another one for HTTP: chasqui serve --http_port {free}")
    elif http_port:
        yield _gateway_port(host, http_port, "gateway, HTTP", "--http_port", "none: --http_port 0")
    for single, service in SINGLE_SERVICES.items():
        if single in {port, http_port}:
            continue
        reason = why_taken(host, single)
        if reason is None:
            yield fine("port", f"{single} is free ({service})")
        else:
            text = f"{single} ({service}): {reason}{_holder(single)}"
            yield remark("port", f"{text}; chasqui serve does not need it")


def _gateway_port(host: str, port: int, use: str, flag: str, *others: str) -> Finding:
    """Whether the gateway can listen there; `flag` names another port, `others` do without."""
    reason = why_taken(host, port)
    if reason is None:
        return fine("port", f"{port} is free ({use})")
    ways = ["stop that process", f"choose another port: chasqui serve {flag} {_free_port(host)}"]
    return wrong("port", f"{port} ({use}): {reason}{_holder(port)}", ", or ".join([*ways, *others]))


def _free_port(host: str) -> int:
    """A port that is free now."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    """The process that listens on a port, where the system tells this user."""
    try:
        import psutil  # noqa: PLC0415  # belongs to the extra `model`
    except ModuleNotFoundError:
        return ""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            # An address is a pair, or empty for a socket that has none yet.
            if listens and connection.laddr[1:] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                return f", by process {process.pid} ({' '.join(process.cmdline()[:4])})"
    return ""
