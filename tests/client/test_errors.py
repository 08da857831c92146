"""How the statuses of a gateway, and of no gateway, read in Python."""

import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Protobuf
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from client import (
    ChasquiError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    Message,
    Model,
    ResourceExhaustedError,
    UnavailableError,
    UnreachableError,
    Violation,
)

GetModel = Callable[[str], Model]
StartGateway = Callable[..., str]


def failing(code: grpc.StatusCode, message: str, *details: Protobuf) -> Callable[..., Any]:
    """A method that ends with this status, as the services end theirs."""
    status = Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)

    def behaviour(_request: object, context: grpc.ServicerContext) -> None:
        packed = ("grpc-status-details-bin", status.SerializeToString())
        context.set_trailing_metadata((("x-request-id", "abc"), packed))
        context.abort(code, message)

    return behaviour


def test_invalid_argument_names_the_fields(
    start_gateway: StartGateway, get_model: GetModel
) -> None:
    details = BadRequest()
    details.field_violations.add(field="dialogs", description="must not be empty")
    behaviour = failing(grpc.StatusCode.INVALID_ARGUMENT, "dialogs: must not be empty", details)

    with pytest.raises(InvalidRequestError, match="dialogs: must not be empty") as caught:
        get_model(start_gateway(GetModel=behaviour))

    assert caught.value.violations == (Violation("dialogs", "must not be empty"),)
    assert caught.value.request_id == "abc"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
    ],
)
def test_a_status_that_passes_says_when_to_try_again(
    start_gateway: StartGateway,
    get_model: GetModel,
    code: grpc.StatusCode,
    error: type[ChasquiError],
) -> None:
    details = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))

    with pytest.raises(error, match="later") as caught:
        get_model(start_gateway(GetModel=failing(code, "later", details)))

    assert isinstance(caught.value, UnavailableError | ResourceExhaustedError)
    assert not isinstance(caught.value, UnreachableError)
    assert caught.value.retry_after == 1.5


def test_other_statuses_keep_code_message_and_request_id(
    start_gateway: StartGateway, get_model: GetModel
) -> None:
    behaviour = failing(grpc.StatusCode.INTERNAL, "internal error, request id abc")

    with pytest.raises(ChasquiError, match="internal error, request id abc") as caught:
        get_model(start_gateway(GetModel=behaviour))

    assert (caught.value.code, caught.value.request_id) == (grpc.StatusCode.INTERNAL, "abc")


def test_a_deadline_that_passes_is_its_own_error(
    unfinished: Any,
) -> None:
    dialog: list[Message] = [{"role": "user", "content": "Hello"}]

    with Client(unfinished.target) as client, pytest.raises(DeadlineExceededError):
        list(client.chat_stream(dialog, timeout=0.5))

    assert len(unfinished.cancelled_names) == 1
    # Where the machine is busy, the deadline can pass before the call reaches the gateway.
    assert unfinished.names in ([], unfinished.cancelled_names)


def test_nothing_at_the_target_is_said_in_clear_words(get_model: GetModel) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{unused.getsockname()[1]}"

        with pytest.raises(UnreachableError) as caught:
            get_model(target)

    assert str(caught.value) == f"nothing answers at {target} (Connection refused)"


def test_another_grpc_server_at_the_target_is_recognised(
    start_gateway: StartGateway, get_model: GetModel
) -> None:
    target = start_gateway()

    with pytest.raises(ChasquiError, match=f"{target} answers, but it is not a gateway"):
        get_model(target)
