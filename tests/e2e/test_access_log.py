"""The access log: one line a request, with what it cost."""

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import TextCompleteRequest, TextCompleteStreamRequest
from llama.v1.sampling_pb2 import SamplingParams

PROMPT = "The llama walks over the bridge"


def lines(gateway: Any, request_id: str) -> list[dict[str, Any]]:
    """The access log's lines of a request, once there is one."""
    found: list[dict[str, Any]] = []
    while not found:
        records = [json.loads(line) for line in list(gateway.log) if line.startswith("{")]
        found = [
            record
            for record in records
            if record["logger"] == "access" and record["request_id"] == request_id
        ]
    return found


async def test_line_tells_what_usage_tells(chat: Any, stack: Any) -> None:
    sampling = SamplingParams(temperature=0, max_gen_len=8, ignore_eos=True)
    request = TextCompleteRequest(prompts=[PROMPT], sampling=sampling)
    response = await chat.TextComplete(request, metadata=(("x-request-id", "counted"),))
    usage = response.predictions[0].usage
    [line] = lines(stack.gateway, "counted")
    assert (line["method"], line["code"], line["answers"]) == ("TextComplete", "OK", 1)
    for name in ("prompt_tokens", "cached_prompt_tokens", "completion_tokens"):
        assert line[name] == getattr(usage, name)
    for name in ("queue_time", "prefill_time", "decode_time", "compute_time"):
        assert line[name] == pytest.approx(getattr(usage, name).ToNanoseconds() / 1e9, abs=1e-6)
    assert line["total_time"] >= usage.total_time.ToNanoseconds() / 1e9 - 1e-3
    assert line["finish_reasons"] == {"length": 1}


async def test_answers_of_a_request_are_summed_in_one_line(chat: Any, stack: Any) -> None:
    sampling = SamplingParams(temperature=0, max_gen_len=8, ignore_eos=True)
    request = TextCompleteRequest(prompts=[PROMPT, "a"], sampling=sampling, n=2)
    await chat.TextComplete(request, metadata=(("x-request-id", "summed"),))
    [line] = lines(stack.gateway, "summed")
    assert (line["answers"], line["completion_tokens"]) == (4, 32)
    assert line["finish_reasons"] == {"length": 4}


async def test_cancelled_and_refused_requests_have_their_line(chat: Any, stack: Any) -> None:
    # More sequences than run at once: their end is far away when the client cancels.
    endless = SamplingParams(temperature=0, ignore_eos=True)
    request = TextCompleteStreamRequest(prompts=[PROMPT] * 64, sampling=endless, n=4)
    stream = chat.TextCompleteStream(request, metadata=(("x-request-id", "left"),))
    while not (await stream.read()).event.HasField("delta"):
        pass
    stream.cancel()
    with pytest.raises(grpc.aio.AioRpcError):
        await chat.TextComplete(TextCompleteRequest(), metadata=(("x-request-id", "refused"),))
    [left], [refused] = lines(stack.gateway, "left"), lines(stack.gateway, "refused")
    assert (left["code"], refused["code"]) == ("CANCELLED", "INVALID_ARGUMENT")
    assert left["completion_tokens"] > refused["completion_tokens"] == 0


async def test_neither_texts_nor_addresses_are_logged(chat: Any, stack: Any) -> None:
    request = TextCompleteRequest(prompts=["a private matter"])
    await chat.TextComplete(request, metadata=(("x-request-id", "private"),))
    [line] = lines(stack.gateway, "private")
    assert "client_address" not in line
    assert not any("private matter" in line for line in stack.gateway.log)


def test_address_is_logged_where_it_is_asked_for(gateway_beside: Callable[..., Any]) -> None:
    gateway = gateway_beside(log_client_addresses=True)
    with grpc.insecure_channel(gateway.address) as channel:
        stub: Any = channel.unary_unary("/llama.v1.ChatService/TextComplete")
        with pytest.raises(grpc.RpcError):
            stub(b"", metadata=(("x-request-id", "known"),))
    [line] = lines(gateway, "known")
    assert line["client_address"].startswith("ipv4:127.0.0.1:")
