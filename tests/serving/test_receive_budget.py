"""The bytes of large requests, shared by callers."""

from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import RequestError
from serving.intake import receive_budget
from serving.intake.receive_budget import MAX_BYTES, ReceiveBudget
from serving.server import channel, running
from serving.settings import ServerSettings

MIB = 1024 * 1024


# A field that the message does not know, so that it is large whatever else it says.
PADDING = b"\x7a\x80\x80\x40" + b"x" * MIB


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX_BYTES)), max_size=30))
def test_no_caller_keeps_another_from_its_share(requests: list[tuple[str, int]]) -> None:
    budget, own = ReceiveBudget(), 0
    with ExitStack() as calls:
        for caller, size in requests:
            reserve = calls.enter_context(budget.reservation(caller))
            with suppress(RequestError):
                reserve(size)
                own += size * (caller == "a")
                continue
            # There are at most three callers.
            assert caller != "a" or own + size > MAX_BYTES // 3
    with budget.reservation("a") as reserve:
        reserve(MAX_BYTES)  # all was given back


async def test_large_requests_of_a_caller_are_bounded_until_they_are_answered(
    echo: Any, servers: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive_budget, "MAX_BYTES", 2 * MIB)
    server = await servers.enter_async_context(running(ServerSettings(), echo.service()))
    async with channel(server.address) as to_server:
        method: Any = to_server.unary_unary("/test.Echo/unary_unary")
        first = method(StringValue(value="hold").SerializeToString() + PADDING)
        await echo.held.wait()
        refused = method(PADDING)
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "requests of this caller that are being answered" in await refused.details()
        assert await method(b"") == b""
        echo.released.set()
        await first
        while await (again := method(PADDING)).code() is not grpc.StatusCode.OK:
            assert await again.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
