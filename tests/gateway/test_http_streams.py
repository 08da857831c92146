"""Named streams over HTTP, a full queue, and a gateway that shuts down."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llama.v1.chat_pb2 import CancelStreamRequest
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "max_tokens": 9,
}
NAMED = {"idempotency-key": "5e1c1b52"}


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as client:
        yield client


async def broken_off(http: httpx2.AsyncClient, model: ScriptedModel) -> tuple[str, list[str]]:
    """Begins a stream and leaves after two events; returns its sequence and these events."""
    async with http.stream("POST", CHAT, json=HELLO, headers=NAMED) as response:
        events = response.aiter_text()
        seen = await anext(events)
        sequence = (await model.starts.get()).sequence_id
        model.tell(sequence, ids=[300])
        while seen.count("\n\n") < 2:
            seen += await anext(events)
    return sequence, seen.split("\n\n")[:-1]


async def test_broken_stream_is_continued_behind_its_last_event(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    sequence, seen = await broken_off(http, model)
    assert [each.splitlines()[0] for each in seen] == ["id: 1", "id: 2"]
    model.tell(sequence, ids=[301])
    model.tell(sequence, ids=[302], finish_reason=FINISH_REASON_STOP)
    again = await http.post(CHAT, json=HELLO, headers={**NAMED, "last-event-id": "2"})
    rest = again.text.split("\n\n")[:-1]
    numbers = [int(each.splitlines()[0].removeprefix("id: ")) for each in rest]
    assert numbers == [*range(3, 3 + len(rest))]
    assert rest[-1].endswith("data: [DONE]")
    whole = await http.post(CHAT, json=HELLO, headers=NAMED)  # a repeated request is not run again
    assert whole.text.split("\n\n")[:-1] == [*seen, *rest]
    assert model.starts.empty()
    assert model.cancels.empty()


async def test_key_of_another_request_names_another_stream(
    http: httpx2.AsyncClient, model: ScriptedModel, gateway: RunningGateway
) -> None:
    await broken_off(http, model)
    other = asyncio.create_task(http.post(CHAT, json=HELLO | {"max_tokens": 8}, headers=NAMED))
    sequence = (await model.starts.get()).sequence_id
    model.tell(sequence, ids=[301], finish_reason=FINISH_REASON_STOP)
    assert (await other).text.startswith("id: 1\n")
    with pytest.raises(Exception, match="there is no stream"):
        await gateway.stub.CancelStream(CancelStreamRequest(stream_name=NAMED["idempotency-key"]))


@pytest.mark.parametrize(
    ("headers", "status", "param", "message"),
    [
        (
            {**NAMED, "last-event-id": "1"},
            404,
            None,
            "no stream with the Idempotency-Key '5e1c1b52'",
        ),
        ({**NAMED, "last-event-id": "x"}, 400, "Last-Event-ID", "must be the id of an event"),
        ({"last-event-id": "1"}, 400, "Last-Event-ID", "needs Idempotency-Key"),
        ({"idempotency-key": "a b"}, 400, "Idempotency-Key", "must be 1 to 128 characters"),
    ],
)
async def test_wrong_names_and_numbers_are_refused(
    headers: dict[str, str], status: int, param: str, message: str, http: httpx2.AsyncClient
) -> None:
    refused = await http.post(CHAT, json=HELLO, headers=headers)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (status, param)
    assert message in error["message"]


async def test_event_that_is_still_to_come_is_out_of_range(
    http: httpx2.AsyncClient, model: ScriptedModel
) -> None:
    await broken_off(http, model)
    refused = await http.post(CHAT, json=HELLO, headers={**NAMED, "last-event-id": "7"})
    assert refused.status_code == 416
    assert refused.json()["error"]["message"].startswith("Last-Event-ID: must be at most 2")


async def test_full_queue_is_429_with_the_time_to_wait(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_queued_sequences=1, max_dialogs=1)
    await gateway.until(serving=True)
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as http:
        running = asyncio.create_task(http.post(CHAT, json=HELLO))
        sequence = (await model.starts.get()).sequence_id
        refused = await http.post(CHAT, json=HELLO)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        model.tell(sequence, ids=[300], finish_reason=FINISH_REASON_STOP)
        assert (await running).status_code == 200


async def test_headers_tell_what_is_left_of_the_quotas_of_the_key(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    tmp_path: Path,
) -> None:
    digests = {key: hashlib.sha256(key.encode()).hexdigest() for key in ("bounded", "free")}
    keys = [f'[[keys]]\nname = "{key}"\nsha256 = "{digest}"\n' for key, digest in digests.items()]
    keys.insert(1, "max_sequences = 2\nmax_tokens = 100\n")
    (tmp_path / "keys.toml").write_text("".join(keys))
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, api_keys=tmp_path / "keys.toml")
    await gateway.until(serving=True)
    bearer = {"authorization": "Bearer bounded"}
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as http:
        async with http.stream("POST", CHAT, json=HELLO, headers=bearer) as begun:
            start = await model.starts.get()
            tokens = len(start.prompt_ids) + HELLO["max_tokens"]
            assert rate_limits(begun) == {
                "limit-requests": "2",
                "remaining-requests": "1",
                "reset-requests": "1s",
                "limit-tokens": "100",
                "remaining-tokens": str(100 - tokens),
                "reset-tokens": "1s",
            }
            refused = await http.post(CHAT, json=HELLO | {"n": 2}, headers=bearer)
            assert (refused.status_code, rate_limits(refused)) == (429, rate_limits(begun))
            model.tell(start.sequence_id, ids=[300], finish_reason=FINISH_REASON_STOP)
            await begun.aread()
        idle = rate_limits(await http.get("/v1/models", headers=bearer))
        assert (idle["remaining-requests"], idle["reset-requests"]) == ("2", "0s")
        assert (idle["remaining-tokens"], idle["reset-tokens"]) == ("100", "0s")
        for headers in ({"authorization": "Bearer free"}, {}):
            assert not rate_limits(await http.get("/v1/models", headers=headers))


def rate_limits(response: httpx2.Response) -> dict[str, str]:
    prefix = "x-ratelimit-"
    found = {name: value for name, value in response.headers.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


async def test_gateway_that_drains_finishes_running_streams(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, grace_period=60)
    await gateway.until(serving=True)
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as http:
        running = asyncio.create_task(http.post(CHAT, json=HELLO))
        sequence = (await model.starts.get()).sequence_id
        model.tell(sequence, ids=[300])
        stopping = asyncio.create_task(gateway.server.aclose())
        await gateway.until(serving=False)
        assert (await http.get("/health")).status_code == 503
        await until_closed(http)
        model.tell(sequence, ids=[301], finish_reason=FINISH_REASON_STOP)
        assert (await running).text.endswith("data: [DONE]\n\n")
        await stopping


async def until_closed(http: httpx2.AsyncClient) -> None:
    """Waits until the port is closed."""
    while True:
        try:
            await http.get("/health")
        except httpx2.ConnectError:
            return
        except httpx2.TransportError:
            continue


async def test_stream_that_outlasts_the_grace_period_is_cut_off(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway: Any = await start_gateway(tokenizer_target, address, grace_period=0)
    await gateway.until(serving=True)
    async with httpx2.AsyncClient(base_url=gateway.http_url, timeout=60) as http:
        running = asyncio.create_task(http.post(CHAT, json=HELLO))
        sequence = (await model.starts.get()).sequence_id
        await gateway.server.aclose()
        assert await model.cancels.get() == sequence
        with pytest.raises(httpx2.TransportError):
            await running
