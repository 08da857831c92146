"""`python -m serving.healthcheck HOST:PORT`: what a container's healthcheck runs in it.

Exit status 0 if the server there is SERVING, 1 if not, 2 for wrong usage; one line says what it
found. It runs every few seconds beside the service, so it imports next to nothing.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

_ENDLESS = 1e9  # seconds, 31 years

SERVING = HealthCheckResponse.ServingStatus.Name(HealthCheckResponse.SERVING)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.healthcheck",
        description="Asks a gRPC server for its health; exit status 0 if it is SERVING, else 1.",
    )
    parser.add_argument("target", type=_target, metavar="HOST:PORT", help="address of the server")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        help="seconds it has to answer; inf: any number (default: 5)",
    )
    arguments = parser.parse_args(argv)
    state = health(arguments.target, arguments.timeout)
    print(f"{arguments.target}: {state}")
    return 0 if state == SERVING else 1


def health(target: str, timeout: float | None) -> str:
    """The state of the server as a whole, or why it did not tell."""
    # Docker hands its client's proxy settings to containers; this must not leave the container.
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub = HealthStub(channel)
            response = stub.Check(HealthCheckRequest(), timeout=timeout)  # type: ignore[attr-defined]  # not in the stubs
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return HealthCheckResponse.ServingStatus.Name(response.status)


def _target(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not (host and port.isdigit()):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def _seconds(text: str) -> float | None:
    """None for more than gRPC can count, which it would take for no time at all."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return None if seconds > _ENDLESS else seconds


if __name__ == "__main__":
    sys.exit(main())
