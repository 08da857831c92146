"""Errors as OpenAI's API has them: the HTTP status, the headers, and the error object."""

import math
from dataclasses import dataclass
from typing import Any

import grpc

from serving.errors import MAX_FIELD_BYTES, RequestError, to_status
from serving.security.keys import SCHEME

_STATUSES = {
    grpc.StatusCode.CANCELLED: 499,  # nginx's code for a client that has gone
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 408,  # the request did not arrive in time
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 416,
    grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_CODES = {
    grpc.StatusCode.UNAUTHENTICATED: "invalid_api_key",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
}
_CONTENT_TOO_LARGE = 413


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as it is sent."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


def error_answer(error: RequestError) -> ErrorAnswer:
    """`param` is the first wrong field, and the message names all of them."""
    never = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is None
    status = _CONTENT_TOO_LARGE if never else _STATUSES.get(error.code, 500)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    if status == 401:
        headers["www-authenticate"] = SCHEME.strip()
    param = error.violations[0].field[:MAX_FIELD_BYTES] if error.violations else None
    code = "content_too_large" if never else _CODES.get(error.code, error.code.name.lower())
    if error.code is grpc.StatusCode.NOT_FOUND and error.message.startswith("model: "):
        param, code = "model", "model_not_found"
    body = error_body(to_status(error).message, status, code, param=param)
    return ErrorAnswer(status, headers, body)


def error_body(
    message: str, status: int, code: str | None, *, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {"message": message, "type": _type(status), "param": param, "code": code},
    }


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"
