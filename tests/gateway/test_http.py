"""OpenAI's API over HTTP in front of the pipeline, as clients see it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest

from llama.v1.chat_pb2 import TextCompleteRequest
from llama.v1.model_pb2 import TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import Log, RunningGateway, ScriptedModel, StartGateway, StartServer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


async def error_of(http: httpx2.AsyncClient, path: str, **body: Any) -> tuple[int, Any, str]:
    """The status, the wrong field and the message of a refused request."""
    response = await http.post(path, json=body)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


def chunks(stream: str) -> list[dict[str, Any]]:
    """The chunks of a stream in front of its end."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line[:5] == "data:"]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("body", "param", "rule"),
    [
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "must be 'system'"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0].role", "first message"),
        (HELLO | {"tools": []}, "tools", "is not supported here"),
        (HELLO | {"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        (HELLO | {"temperature": 101}, "temperature", "0 to 100"),
        (HELLO | {"max_tokens": 2**32}, "max_tokens", "4294967295"),
        (HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "must be equal"),
        (HELLO | {"min_tokens": 2, "max_tokens": 1}, "min_tokens", "at most max_tokens, 1"),
        (HELLO | {"stop": ["a", ""]}, "stop[1]", "1 to 256 characters"),
        (HELLO | {"logit_bias": {"9999": 1}}, "logit_bias[9999]", "vocabulary size"),
        (HELLO | {"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        (HELLO | {"n": 0}, "n", "1 to 16"),
        (HELLO | {"stream_options": {}}, "stream_options", "needs stream"),
    ],
)
async def test_wrong_field_of_a_chat_is_named_as_the_client_wrote_it(
    body: dict[str, Any], param: str, rule: str, http: httpx2.AsyncClient
) -> None:
    status, named, message = await error_of(http, CHAT, **body)
    assert (status, named) == (400, param)
    assert f"{param}: " in message
    assert rule in message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "Once", "suffix": "end"}, "suffix"),
        ({"prompt": [1, 9999]}, "prompt[1]"),
        ({"prompt": [[1], [1, 9999]]}, "prompt[1][1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "Once " * 300}, "prompt"),
        ({"prompt": ["Once", "Once " * 300]}, "prompt[1]"),
        ({"prompt": "Once", "logprobs": 21}, "logprobs"),
        ({"prompt": "Once", "max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ({}, "prompt"),
    ],
)
async def test_wrong_field_of_a_text_is_named_as_the_client_wrote_it(
    body: dict[str, Any], param: str, http: httpx2.AsyncClient
) -> None:
    status, named, message = await error_of(http, TEXT, **body)
    assert (status, named) == (400, param)
    assert message.startswith(f"{param}: ")


async def test_null_stands_for_an_absent_field_also_where_it_is_not_supported(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    message = {"role": "user", "content": "Hello", "tool_calls": None, "audio": None}
    sent = asyncio.create_task(
        http.post(CHAT, json={"messages": [message], "tools": None, "stop": None, "top_k": None})
    )
    sequence = (await model.starts.get()).sequence_id
    model.tell(sequence, ids=[300], finish_reason=FINISH_REASON_STOP)
    assert (await sent).status_code == 200


async def test_other_model_is_not_found_and_malformed_bodies_are_refused(
    http: httpx2.AsyncClient,
) -> None:
    assert (await error_of(http, CHAT, model="gpt-9", **HELLO))[:2] == (404, "model")
    broken = await http.post(
        CHAT, content=b'{"messages"', headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400
    assert "is not JSON" in broken.json()["error"]["message"]
    form = await http.post(CHAT, data={"messages": "Hello"})
    assert (form.status_code, "Content-Type" in form.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels_the_sequence(
    stream: bool, gateway: RunningGateway, model: ScriptedModel
) -> None:
    async with httpx2.AsyncClient(base_url=gateway.http_url) as http:
        sent = asyncio.create_task(http.post(CHAT, json=HELLO | {"stream": stream}))
        sequence = (await model.starts.get()).sequence_id
        sent.cancel()
    assert await model.cancels.get() == sequence


async def test_n_streamed_answers_are_told_apart_and_their_usage_is_summed(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = HELLO | {"stream": True, "n": 2, "stream_options": options}
    sent = asyncio.create_task(http.post(CHAT, json=body))
    for seed_order in range(2):
        start = await model.starts.get()
        model.tell(start.sequence_id, ids=[300 + seed_order])
        model.tell(start.sequence_id, ids=[310], finish_reason=FINISH_REASON_STOP)
    *told, last = chunks((await sent).text)
    assert {chunk["choices"][0]["index"] for chunk in told} == {0, 1}
    first = [chunk["choices"][0]["delta"] for chunk in told if "role" in str(chunk["choices"])]
    assert [delta["role"] for delta in first] == ["assistant", "assistant"]
    assert all("usage" in chunk for chunk in told)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens"] == len(start.prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_only_text_completions_list_the_token_that_ends_an_answer(
    gateway: RunningGateway, http: httpx2.AsyncClient, model: ScriptedModel, stream: bool
) -> None:
    end: Any = {"stop_token_id": 2, "finish_reason": FINISH_REASON_STOP}
    end |= {"ids": [300], "logprobs": [-1.0, -0.5], "ranks": [1, 2]}
    body = {"prompt": "Once", "logprobs": 0, "stream": stream}
    sent = asyncio.create_task(http.post(TEXT, json=body))
    model.tell((await model.starts.get()).sequence_id, **end)
    answers = chunks((await sent).text) if stream else [(await sent).json()]
    told = [answer["choices"][0]["logprobs"] for answer in answers]
    assert [x for each in told if each for x in each["token_logprobs"]] == [-1.0, -0.5]
    assert [x for each in told if each for x in each["tokens"]][-1] == ""
    call = gateway.stub.TextComplete(TextCompleteRequest(prompts=["Once"], logprobs=True))
    model.tell((await model.starts.get()).sequence_id, **end)
    [prediction] = (await call).predictions
    assert [token.logprob for token in prediction.tokens] == [-1.0]
    assert prediction.stop_token_id == 2


async def test_headers_come_before_the_first_token_and_chunks_alone_behind_them(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    async with http.stream("POST", TEXT, json={"prompt": "Once", "stream": True}) as response:
        assert response.status_code == 200
        model.tell((await model.starts.get()).sequence_id, ids=[300])
        assert (await anext(response.aiter_text())).startswith("data: ")


async def test_error_in_a_stream_is_its_last_event(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    sent = asyncio.create_task(http.post(CHAT, json=HELLO | {"stream": True}))
    sequence = (await model.starts.get()).sequence_id
    model.tell(sequence, ids=[300])
    model.tell(sequence, error={"code": 13, "message": "the logits are not finite"})
    *_, last = [line for line in (await sent).text.splitlines() if line]
    assert (
        json.loads(last.removeprefix("data: "))["error"]["message"] == "the logits are not finite"
    )


async def test_client_that_stops_reading_loses_its_stream_at_the_bound(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_unread_bytes=4096)
    await gateway.until(serving=True)
    host, port = gateway.http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = json.dumps(
        {"prompt": "Once", "stream": True, "logprobs": 20, "max_tokens": 9999}
    ).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    sequence = (await model.starts.get()).sequence_id
    cancelled = asyncio.create_task(model.cancels.get())
    top = TopLogprobs(ids=[300] * 20, logprobs=[0] * 20)
    while not cancelled.done():
        model.tell(sequence, ids=[300] * 10, logprobs=[0.0] * 10, ranks=[1] * 10, top=[top] * 10)
        await asyncio.sleep(0)
    assert cancelled.result() == sequence
    assert b"reads too slowly" in await reader.read()
    writer.close()


async def test_calls_of_both_protocols_are_counted_and_logged_alike(
    gateway: RunningGateway, http: httpx2.AsyncClient, model: ScriptedModel, log: Log
) -> None:
    headers = {"x-request-id": "mine"}
    sent = asyncio.create_task(http.post(CHAT, json=HELLO, headers=headers))
    sequence = (await model.starts.get()).sequence_id
    model.tell(sequence, ids=[300], finish_reason=FINISH_REASON_STOP)
    assert (await sent).headers["x-request-id"] == "mine"
    finished = await log.wait_for("request finished")
    assert (finished["method"], finished["code"]) == ("ChatComplete", "OK")
    call = await log.wait_for("call finished")
    assert (call["method"], call["status"]) == ("/http/createChatCompletion", 200)


async def test_without_a_replica_health_and_requests_say_503(
    start_gateway: StartGateway, tokenizer_target: str, servers: AsyncExitStack
) -> None:
    gateway = await start_gateway(tokenizer_target, "127.0.0.1:9")
    async with httpx2.AsyncClient(base_url=gateway.http_url) as http:
        health = await http.get("/health")
        assert (health.status_code, health.headers["retry-after"]) == (503, "1")
        refused = await http.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["type"] == "server_error"
