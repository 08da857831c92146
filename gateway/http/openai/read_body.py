"""Reads a request's body: JSON within bounds, then the fields that are served, with an error that
names each wrong one.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from gateway.http.openai.fields import Body, property_path, without
from serving.errors import Violation, invalid_argument, resource_exhausted

BodyT = TypeVar("BodyT", bound=Body)

# Numbers in a list cost little: as many as in serving.intake.field_count.
_NUMBERS_PER_FIELD = 8


def reader(body_type: type[BodyT], max_fields: int) -> Callable[[bytes], BodyT]:
    """The function that reads bodies of this type; it raises INVALID_ARGUMENT."""
    return partial(_read, body_type, max_fields)


def _read(body_type: type[BodyT], max_fields: int, body: bytes) -> BodyT:
    _require_few_fields(body, max_fields)
    try:
        return body_type.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    absent = [each for each in problems if each["type"] == "extra_forbidden" and not _given(each)]
    if absent:
        # Clients write null for what they do not use, also for fields that are not served.
        parsed = from_json(body)
        for each in absent:
            without(parsed, each["loc"])
        return _read(body_type, max_fields, to_json(parsed))
    raise invalid_argument([_violation(each) for each in problems]) from None


def _require_few_fields(body: bytes, max_fields: int) -> None:
    """Bounds the cost of parsing, which depends on the number of values and not of bytes.

    Counts in texts, too: one with so many braces, brackets and colons would not fit a context.
    """
    if len(body) <= max_fields:
        return
    fields = body.count(b"{") + body.count(b"[") + body.count(b":")
    fields += body.count(b",") // _NUMBERS_PER_FIELD
    if fields > max_fields:
        message = f"the request has more than {max_fields} fields in all of its parts"
        raise resource_exhausted(message, "max_request_fields", retry_after=None)


def _given(problem: ErrorDetails) -> bool:
    return problem["input"] is not None


def _violation(problem: ErrorDetails) -> Violation:
    match problem["type"]:
        case "json_invalid":
            reason = problem.get("ctx", {}).get("error", "")
            return Violation("body", f"is not JSON in UTF-8: {reason}")
        case "extra_forbidden":
            rule = "is not supported here"
        case "missing":
            rule = "is missing"
        case _:
            rule = re.sub(r"^Input should be", "must be", problem["msg"])
    return Violation(property_path(problem["loc"]) or "body", rule)
