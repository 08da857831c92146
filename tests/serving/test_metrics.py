"""The metrics that every server has, scraped over HTTP."""

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import StartError
from serving.server import running
from serving.settings import ServerSettings

Logged = Callable[[], list[dict[str, Any]]]
GRPC_TYPES = {
    "unary_unary": "unary",
    "unary_stream": "server_stream",
    "stream_unary": "client_stream",
    "stream_stream": "bidi_stream",
}


def metrics_address(logged: Logged) -> str:
    [address] = [line["address"] for line in logged() if line["event"] == "serving metrics"]
    return str(address)


async def scrape(logged: Logged) -> dict[str, float]:
    """Samples by name and sorted label values."""
    url = f"http://{metrics_address(logged)}/metrics"
    text = await asyncio.to_thread(lambda: urlopen(url).read().decode())
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return {
        " ".join(
            [sample.name, *(sample.labels[key] for key in sorted(sample.labels))]
        ): sample.value
        for sample in samples
    }


@pytest.mark.parametrize(
    ("text", "code"), [("hello", "OK"), ("refuse", "InvalidArgument"), ("boom", "Internal")]
)
async def test_call_is_counted_by_its_status(
    logged: Logged, call: Any, kind: str, text: str, code: str
) -> None:
    await call(kind, text)
    labels = f"{kind} test.Echo {GRPC_TYPES[kind]}"
    while not (samples := await scrape(logged)).get(f"grpc_server_handled_total {code} {labels}"):
        pass
    expected = {"grpc_server_started_total": 1, "grpc_server_handling_seconds_count": 1}
    assert {name: samples[f"{name} {labels}"] for name in expected} == expected
    assert samples[f"chasqui_calls_in_flight {labels}"] == 0


async def test_refusal_is_counted_by_the_quota_that_ran_out(logged: Logged, call: Any) -> None:
    await call("unary_unary", "exhaust")
    wanted = (
        "chasqui_refusals_total ResourceExhausted unary_unary test.Echo unary max_queued_sequences"
    )
    while not (await scrape(logged)).get(wanted):
        pass


async def test_call_that_runs_is_in_flight(logged: Logged, call: Any, echo: Any) -> None:
    held = asyncio.create_task(call("unary_unary", "hold"))
    await echo.held.wait()
    assert (await scrape(logged))["chasqui_calls_in_flight unary_unary test.Echo unary"] == 1
    echo.released.set()
    await held


async def test_process_and_health_are_told(logged: Logged, call: Any) -> None:
    samples = await scrape(logged)
    assert samples["chasqui_serving"] == 1
    assert samples["process_resident_memory_bytes"] > 1e7


async def test_no_port_is_opened_unless_one_is_named(logged: Logged, echo: Any) -> None:
    async with running(ServerSettings(), echo.service()):
        assert "serving metrics" not in {line["event"] for line in logged()}


async def test_port_that_is_taken_is_named_with_what_to_do(
    logged: Logged, call: Any, echo: Any
) -> None:
    port = int(metrics_address(logged).rpartition(":")[2])
    settings = ServerSettings(metrics_port=port)
    with pytest.raises(StartError, match=f"cannot serve metrics on 127.0.0.1:{port}: .*--metrics"):
        async with running(settings, echo.service()):
            pass
