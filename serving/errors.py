"""Errors that refuse a request: raise `RequestError` where the fault is found, with all details.

`to_status` alone makes a google.rpc.Status from it. Its message and details are sent in HTTP/2
trailers, and clients may refuse more than 8 KiB of those, so their size is limited.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import grpc
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

MAX_VIOLATIONS = 8
MAX_MESSAGE_BYTES = 768
MAX_FIELD_BYTES = 96
MAX_DESCRIPTION_BYTES = 224


class StartError(Exception):
    """The service cannot run. The process ends with this one line, which says what to do."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of a request that breaks a rule, by its path: `dialogs[1].messages[0].role`."""

    field: str
    description: str


class RequestError(Exception):
    """Ends a call with this status.

    `retry_after` is in seconds; `quota` names the exhausted limit.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        quota: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after = retry_after
        self.quota = quota


def invalid_argument(violations: Sequence[Violation]) -> RequestError:
    """INVALID_ARGUMENT; the message names each field with the rule that it breaks."""
    named = [f"{each.field}: {each.description}" for each in violations[:MAX_VIOLATIONS]]
    if len(violations) > MAX_VIOLATIONS:
        named.append(f"and {len(violations) - MAX_VIOLATIONS} more")
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, "; ".join(named), tuple(violations))


def unavailable(message: str, retry_after: float = 1.0) -> RequestError:
    """UNAVAILABLE: the request is valid, and the same one may succeed later."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, message, retry_after=retry_after)


def resource_exhausted(
    message: str, quota_subject: str, retry_after: float | None = 1.0
) -> RequestError:
    """RESOURCE_EXHAUSTED: the limit named by `quota_subject` is reached.

    The same request may succeed after `retry_after` seconds; None: never.
    """
    return RequestError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        message,
        retry_after=retry_after,
        quota=quota_subject,
    )


def clear_frames(error: BaseException | None) -> None:
    """Clears the frames in the tracebacks of an error and its causes.

    A traceback refers to its frames, and they often to their error. The locals of those frames,
    such as the request, would stay in that cycle until the next full garbage collection.
    """
    seen: set[int] = set()  # an error may be among its own causes
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def to_status(error: RequestError) -> Status:
    """The status as it is sent: code, message, and google.rpc details."""
    message = _shorten(error.message, MAX_MESSAGE_BYTES)
    status = Status(code=error.code.value[0], message=message)
    if error.violations:
        status.details.add().Pack(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(
                        field=_shorten(violation.field, MAX_FIELD_BYTES),
                        description=_shorten(violation.description, MAX_DESCRIPTION_BYTES),
                    )
                    for violation in error.violations[:MAX_VIOLATIONS]
                ]
            )
        )
    if error.retry_after is not None:
        delay = timedelta(seconds=error.retry_after)
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    if error.quota is not None:
        subject = _shorten(error.quota, MAX_FIELD_BYTES)
        description = _shorten(error.message, MAX_DESCRIPTION_BYTES)
        violation = QuotaFailure.Violation(subject=subject, description=description)
        status.details.add().Pack(QuotaFailure(violations=[violation]))
    return status


def _shorten(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - len("…".encode())].decode("utf-8", "ignore") + "…"
