"""The request id: in the log lines of a call on every server, and in its reply's metadata.

It is one of structlog's context variables, so every log line has it without passing it on.
"""

import re
import uuid
from collections.abc import Iterable

from structlog.contextvars import get_contextvars

METADATA_KEY = "x-request-id"
CONTEXT_KEY = "request_id"

_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,128}")


def current() -> str | None:
    """The id of the call that this task serves; None outside of a call."""
    request_id: str | None = get_contextvars().get(CONTEXT_KEY)
    return request_id


def from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The caller's id if it sent one that is safe to log and to return, otherwise a new one."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str) and _ACCEPTED.fullmatch(value):
            return value
    return uuid.uuid4().hex
