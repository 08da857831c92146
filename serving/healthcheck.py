"""`python -m serving.healthcheck HOST:PORT`: the healthcheck that runs inside a container.

Prints the state in one line. Exit status 0 if the server is SERVING, 1 if not, 2 for wrong usage.
It runs every few seconds beside the service, so it imports very little.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

_MAX_SECONDS = 1e9  # 31 years

SERVING = HealthCheckResponse.ServingStatus.Name(HealthCheckResponse.SERVING)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.healthcheck",
        description="Checks the health of a gRPC server: exit status 0 if it is SERVING, else 1.",
    )
    parser.add_argument("target", type=_target, metavar="HOST:PORT", help="address of the server")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        help="seconds to wait for the reply; inf waits for ever (default: 5)",
    )
    arguments = parser.parse_args(argv)
    state = health(arguments.target, arguments.timeout)
    print(f"{arguments.target}: {state}")
    return 0 if state == SERVING else 1


def health(target: str, timeout: float | None) -> str:
    """The state of the server as a whole, or the error of the call."""
    # Docker passes its client's proxy settings to containers; this call must not use a proxy.
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
    """None for more seconds than gRPC can count, because it would treat those as 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return None if seconds > _MAX_SECONDS else seconds


if __name__ == "__main__":
    sys.exit(main())
