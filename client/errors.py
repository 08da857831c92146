"""The exceptions that calls raise, with texts that say what to do.

Only `from_rpc_error` converts a gRPC status to one of them. The servers send the request id when
they begin a call (initial metadata) and when they end it (trailing metadata). UNAVAILABLE with the
latter comes from a server, with only the former from a broken connection, with neither from none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status

REQUEST_ID = "x-request-id"

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the path of a request field, and what is wrong with its value."""

    field: str
    description: str


class ChasquiError(Exception):
    """A failed call. `request_id` finds it in the servers' logs; None: it reached no server."""

    def __init__(self, message: str, code: grpc.StatusCode, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.request_id = request_id


class InvalidRequestError(ChasquiError, ValueError):
    """The request breaks rules of the contract; each violation names the field."""

    def __init__(
        self, message: str, violations: tuple[Violation, ...], request_id: str | None = None
    ) -> None:
        super().__init__(message, grpc.StatusCode.INVALID_ARGUMENT, request_id)
        self.violations = violations


class UnavailableError(ChasquiError):
    """The service cannot answer now; retry after `retry_after` seconds, if given."""

    def __init__(
        self, message: str, request_id: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, grpc.StatusCode.UNAVAILABLE, request_id)
        self.retry_after = retry_after


class UnreachableError(UnavailableError):
    """Nothing answers at the target, or the connection broke.

    `client.connection.diagnosis` looks for the cause.
    """


class ConnectionSettingsError(UnreachableError):
    """The target cannot be reached with these settings: TLS on only one side, a certificate that
    one side does not accept, or a proxy that does not let the connection through.
    """


class ResourceExhaustedError(ChasquiError):
    """A queue or a quota is full, or a message is too large; `retry_after` in seconds, if given."""

    def __init__(
        self, message: str, request_id: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, grpc.StatusCode.RESOURCE_EXHAUSTED, request_id)
        self.retry_after = retry_after


class DeadlineExceededError(ChasquiError):
    """The call did not end within its `timeout`; the servers have stopped working on it."""

    def __init__(self, message: str, request_id: str | None = None) -> None:
        super().__init__(message, grpc.StatusCode.DEADLINE_EXCEEDED, request_id)


class StreamLostError(ChasquiError):
    """A stream broke off after `events` delivered events and cannot be resumed."""

    def __init__(self, reason: str, events: int) -> None:
        message = f"the stream was lost after {events} events: {reason}"
        super().__init__(message, grpc.StatusCode.UNAVAILABLE)
        self.events = events


def invalid_request(violations: Iterable[Violation]) -> InvalidRequestError:
    """The error of a request that cannot be sent, in the form in which a server reports it."""
    violations = tuple(violations)
    return InvalidRequestError(
        "; ".join(f"{each.field}: {each.description}" for each in violations), violations
    )


def from_rpc_error(error: grpc.RpcError, target: str) -> ChasquiError:
    """The exception for a call to `target` that ended with a status other than OK."""
    call = cast("grpc.Call", error)  # gRPC raises the failed call itself
    message = call.details() or ""
    request_id = _request_id(call.trailing_metadata())
    status = rpc_status.from_call(call)
    details = status.details if status else []
    match call.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(message, _violations(details), request_id)
        case grpc.StatusCode.UNAVAILABLE if request_id is None:
            return _unreachable(message, target, _request_id(call.initial_metadata()))
        case grpc.StatusCode.UNAVAILABLE:
            return UnavailableError(message, request_id, _retry_after(details))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhaustedError(message, request_id, _retry_after(details))
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceededError("the call did not end within its timeout", request_id)
        case grpc.StatusCode.UNIMPLEMENTED:
            message = f"{target} answers, but it is not a gateway: it does not serve this method"
    return ChasquiError(message, call.code(), request_id)


def _request_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    return next((str(value) for key, value in metadata or () if key == REQUEST_ID), None)


def _unreachable(message: str, target: str, request_id: str | None) -> UnreachableError:
    # gRPC nests its reasons: "failed to connect to all addresses; last error: …: Connection
    # refused". The innermost is the readable one. After a failed handshake gRPC appends ": OK".
    reason = message.removesuffix(": OK").rpartition(": ")[2].rstrip("]")
    if request_id is None:
        return UnreachableError(f"nothing answers at {target} ({reason})")
    return UnreachableError(f"the connection to {target} broke ({reason})", request_id)


def _unpacked(details: Iterable[Any], kind: type[M]) -> M | None:
    for detail in details:
        found = kind()
        if detail.Unpack(found):
            return found
    return None


def _violations(details: Iterable[Any]) -> tuple[Violation, ...]:
    bad_request = _unpacked(details, BadRequest)
    if bad_request is None:
        return ()
    return tuple(Violation(each.field, each.description) for each in bad_request.field_violations)


def _retry_after(details: Iterable[Any]) -> float | None:
    retry = _unpacked(details, RetryInfo)
    return None if retry is None else retry.retry_delay.ToTimedelta().total_seconds()
