"""The interceptor around every call of every service, on each of the four kinds of RPC."""

import asyncio
import io
import json
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import BadRequest
from grpc_status.rpc_status import aio as rpc_status

from serving.server import running
from serving.settings import ServerSettings

Logged = Callable[[], list[dict[str, Any]]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    header = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return header + payload


def reset_calls(address: str, path: str, count: int) -> None:
    """Begins calls and resets each at once; returns when the server has read all of that."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": address}
    headers |= {"te": "trailers", "content-type": "application/grpc"}
    block = b"".join(  # as literals that are in no table
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as to_server:
        to_server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        for stream in range(1, 2 * count, 2):
            cancel = frame(3, 0, stream, (8).to_bytes(4, "big"))
            to_server.sendall(frame(1, 4, stream, block) + cancel)
        to_server.sendall(frame(6, 0, 0, b"read all"))
        answers = b""
        while frame(6, 1, 0, b"read all") not in answers:
            received = to_server.recv(4096)
            assert received, "the server has closed the connection"
            answers += received


def parsed(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def start_stream(to_server: grpc.aio.Channel, text: str) -> Any:
    serialize = StringValue.SerializeToString
    method: Any = to_server.unary_stream("/test.Echo/unary_stream", serialize)
    return method(StringValue(value=text))


async def test_answers_pass_through_unchanged(call: Any, kind: str) -> None:
    outcome = await call(kind, "hello")
    assert outcome.texts == ["hello"]
    assert outcome.code is grpc.StatusCode.OK


@pytest.mark.parametrize("text", ["hello", "refuse", "boom"])
async def test_request_id_comes_back_whatever_the_outcome(call: Any, kind: str, text: str) -> None:
    outcomes = [await call(kind, text, request_id="my.id-1") for _ in range(5)]
    assert {each.trailing_metadata["x-request-id"] for each in outcomes} == {"my.id-1"}
    # gRPC's asyncio client tells of none where a call's status overtakes them.
    initial = {each.initial_metadata.get("x-request-id") for each in outcomes}
    assert "my.id-1" in initial
    assert initial <= {"my.id-1", None}


async def test_service_sees_the_id_that_its_client_gets(call: Any, echo: Any, kind: str) -> None:
    outcome = await call(kind, "hello")
    assert echo.request_ids == [outcome.trailing_metadata["x-request-id"]]


@pytest.mark.parametrize("unsafe", ["", "a b", "a" * 129, 'a"b', "a/b"])
async def test_unsafe_request_id_is_replaced(call: Any, unsafe: str) -> None:
    outcome = await call("unary_unary", "hello", request_id=unsafe)
    assert len(outcome.trailing_metadata["x-request-id"]) == 32


async def test_concurrent_calls_keep_their_own_ids(call: Any) -> None:
    ids = [f"id-{number}" for number in range(20)]
    outcomes = await asyncio.gather(*(call("unary_unary", "hi", request_id=each) for each in ids))
    assert [outcome.trailing_metadata["x-request-id"] for outcome in outcomes] == ids


async def test_refusal_carries_its_status_and_details(call: Any, kind: str) -> None:
    outcome = await call(kind, "refuse")
    status: Any = await rpc_status.from_call(outcome.call)
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert outcome.details == "value: must not be 'refuse'"
    bad_request = BadRequest()
    assert status.details[0].Unpack(bad_request)
    assert [violation.field for violation in bad_request.field_violations] == ["value"]


async def test_internal_error_tells_the_client_its_request_id_only(call: Any, kind: str) -> None:
    outcome = await call(kind, "boom", request_id="abc")
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert outcome.details == "internal error, request id abc"
    assert "secret" not in str(outcome.trailing_metadata)


async def test_internal_error_is_logged_with_traceback_and_request_id(
    logged: Logged, call: Any
) -> None:
    await call("unary_unary", "boom", request_id="abc")
    failure = next(line for line in logged() if line["event"] == "call failed")
    assert failure["request_id"] == "abc"
    assert failure["exception"].endswith("RuntimeError: a secret of the server")


async def test_each_call_logs_one_line_without_what_was_said(
    logged: Logged, call: Any, kind: str
) -> None:
    await call(kind, "private words", request_id="abc")
    lines = [line for line in logged() if line["event"] == "call finished"]
    assert len(lines) == 1
    assert lines[0]["method"] == f"/test.Echo/{kind}"
    assert (lines[0]["code"], lines[0]["request_id"]) == ("OK", "abc")
    assert lines[0]["seconds"] >= 0
    assert "private" not in str(lines)


@pytest.mark.parametrize(("method", "warnings"), [("unary_unary", 1), ("stream_stream", 0)])
async def test_calls_that_are_reset_at_once_are_logged_at_a_limited_rate(
    configure_logs: Any, echo: Any, servers: AsyncExitStack, method: str, warnings: int
) -> None:
    log = configure_logs(log_level="debug", log_format="json")
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    await asyncio.to_thread(reset_calls, server.address, f"/test.Echo/{method}", 100)
    ended: list[dict[str, Any]] = []
    while len(ended) < 100:  # the log alone tells of them
        await asyncio.sleep(0)
        ended = [each for each in parsed(log) if each["event"] == "call finished"]
    assert {each["level"] for each in ended} == {"debug"}
    told = [each["event"] for each in parsed(log) if each["level"] == "warning"]
    assert told == ["calls end before their request arrives"] * warnings


async def test_request_that_is_not_utf8_is_the_callers_fault(call: Any, kind: str) -> None:
    lone_surrogate = b"\x0a\x03\xed\xa0\x80"
    outcome = await call(kind, lone_surrogate)
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "StringValue" in outcome.details
    assert "UTF-8" in outcome.details


async def test_cancelled_stream_closes_its_generator(
    echo: Any, echo_channel: grpc.aio.Channel
) -> None:
    method: Any = echo_channel.unary_stream(
        "/test.Echo/unary_stream", StringValue.SerializeToString
    )
    stream = method(StringValue(value="endless"))
    await stream.read()
    stream.cancel()
    await asyncio.wait_for(echo.closed.wait(), timeout=10)


async def test_cancelled_call_is_logged_as_such(
    logged: Logged, echo: Any, echo_channel: grpc.aio.Channel
) -> None:
    method: Any = echo_channel.unary_stream(
        "/test.Echo/unary_stream", StringValue.SerializeToString
    )
    stream = method(StringValue(value="hold"))
    await echo.held.wait()
    stream.cancel()
    await asyncio.wait_for(echo.closed.wait(), timeout=10)
    finished = [line for line in logged() if line["event"] == "call finished"]
    assert [line["code"] for line in finished] == ["CANCELLED"]


async def test_unknown_method_is_unimplemented(echo_channel: grpc.aio.Channel) -> None:
    method: Any = echo_channel.unary_unary("/test.Echo/nothing")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await method(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
