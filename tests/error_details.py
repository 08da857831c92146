"""The google.rpc details of a refused call, which several services' tests read."""

from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo
from grpc_status.rpc_status import from_call


def details(error: grpc.RpcError) -> list[Any]:
    """All details, in their order."""
    status = from_call(error)  # type: ignore[arg-type]  # errors of calls are calls
    assert status is not None
    found = []
    for packed in status.details:
        for kind in (BadRequest, QuotaFailure, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found.append(kind())
                packed.Unpack(found[-1])
    return found


def violations(error: Any) -> list[tuple[str, str]]:
    """The fields that an INVALID_ARGUMENT names, with the rules that they break."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [bad_request] = details(error)
    assert isinstance(bad_request, BadRequest)
    return [(each.field, each.description) for each in bad_request.field_violations]
