"""Messages that the gateway's tests send, and the details of the errors that they get."""

from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, QuotaFailure, RetryInfo
from grpc_status.rpc_status import from_call

from llama.v1.chat_pb2 import ROLE_USER, Dialog, Message
from llama.v1.sampling_pb2 import TokenIds


def dialog(content: str = "What do llamas eat?") -> Dialog:
    return Dialog(messages=[Message(role=ROLE_USER, content=content)])


def ids_of(*ids: int) -> TokenIds:
    return TokenIds(ids=ids)


def details(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> list[Any]:
    """The google.rpc details of an error."""
    status = from_call(error.value)  # type: ignore[arg-type]  # made for grpc.Call, works as well
    assert status is not None
    found = []
    for packed in status.details:
        for kind in (BadRequest, QuotaFailure, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found.append(kind())
                packed.Unpack(found[-1])
    return found
