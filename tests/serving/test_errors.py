"""A refusal as it arrives at the client."""

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import (
    RequestError,
    Violation,
    clear_frames,
    invalid_argument,
    resource_exhausted,
    to_status,
    unavailable,
)

# Bytes of headers or trailers that HTTP/2 clients and servers accept by default.
METADATA_LIMIT = 8192


def test_every_violation_is_named_in_message_and_details() -> None:
    error = invalid_argument([Violation("a", "must be x"), Violation("b[1]", "must be y")])
    status = to_status(error)
    bad_request = BadRequest()
    assert status.details[0].Unpack(bad_request)
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status.message == "a: must be x; b[1]: must be y"
    named = [(each.field, each.description) for each in bad_request.field_violations]
    assert named == [("a", "must be x"), ("b[1]", "must be y")]


def test_many_violations_are_counted_after_the_first_few() -> None:
    violations = [Violation(f"ids[{index}]", "is bad") for index in range(100)]
    status = to_status(invalid_argument(violations))
    assert status.message.startswith("ids[0]: is bad; ids[1]: is bad; ")
    assert status.message.endswith("; and 92 more")


def test_unavailable_says_when_to_try_again() -> None:
    status = to_status(unavailable("no replica is ready", retry_after=1.5))
    retry = RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5


def test_resource_exhausted_says_what_ran_out() -> None:
    status = to_status(resource_exhausted("queue is full", quota_subject="queue"))
    failure = QuotaFailure()
    assert status.details[1].Unpack(failure)
    assert [(each.subject, each.description) for each in failure.violations] == [
        ("queue", "queue is full")
    ]


@given(st.text(min_size=1), st.integers(1, 5000), st.integers(0, 1000))
def test_status_of_any_error_fits_into_the_trailers(text: str, repeat: int, count: int) -> None:
    violation = Violation(text * repeat, text * repeat)
    error = RequestError(
        grpc.StatusCode.INVALID_ARGUMENT, text * repeat, (violation,) * count, 1.0, text * repeat
    )
    status = to_status(error)
    percent_encoded = 3 * len(status.message.encode())
    base64_encoded = 4 * status.ByteSize() / 3
    assert percent_encoded + base64_encoded < METADATA_LIMIT


def test_an_error_among_its_own_causes_is_let_go_too() -> None:
    error, other = ValueError("one"), ValueError("other")
    error.__cause__, other.__cause__ = other, error
    for each in (error, other):
        with pytest.raises(ValueError, match="o"):
            raise each
    clear_frames(error)
    assert (error.__traceback__, other.__traceback__) == (None, None)
