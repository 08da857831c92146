"""The services' metrics after traffic of known size."""

from collections.abc import Callable
from typing import Any

import grpc
import httpx2
import pytest

from llama.v1.chat_pb2 import (
    ROLE_USER,
    CancelStreamRequest,
    ChatCompleteRequest,
    Dialog,
    Message,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.sampling_pb2 import SamplingParams
from tests.e2e.processes import start_gateway

PROMPT = "The llama walks over the bridge"
UNREACHABLE = "127.0.0.1:1"


def exactly(tokens: int) -> SamplingParams:
    """Greedy answers of so many tokens."""
    return SamplingParams(temperature=0, max_gen_len=tokens, ignore_eos=True)


def lasting(stream_name: str = "") -> TextCompleteStreamRequest:
    """More sequences than run at once: their end is far when the client cancels or scrapes."""
    return TextCompleteStreamRequest(
        prompts=[PROMPT] * 64, n=4, sampling=exactly(200), stream_name=stream_name
    )


class Difference:
    """How much a service's metrics have grown since this was created."""

    def __init__(self, service: Any) -> None:
        self._service = service
        self._before = service.scrape()

    def __call__(self, name: str, **labels: str) -> float:
        value: float = self._service.scrape().value(name, **labels)
        return value - float(self._before.value(name, **labels))


def until(condition: Callable[[], bool]) -> None:
    """Scrapes until it holds: an error reaches its client before it is counted."""
    while not condition():
        pass


async def test_gateway_counts_answers_and_their_tokens(chat: Any, stack: Any) -> None:
    gateway = Difference(stack.gateway)
    dialogs = [Dialog(messages=[Message(role=ROLE_USER, content=text)]) for text in ("a", "bc")]
    request = ChatCompleteRequest(dialogs=dialogs, sampling=exactly(8), n=2)
    usages = [each.usage for each in (await chat.ChatComplete(request)).predictions]
    ok = {"grpc_method": "ChatComplete", "grpc_code": "OK"}
    assert gateway("grpc_server_handled_total", **ok) == 1
    assert gateway("grpc_server_handling_seconds_count", grpc_method="ChatComplete") == 1
    assert gateway("chasqui_gateway_request_seconds_count", grpc_code="OK") == 1
    assert gateway("chasqui_gateway_finished_total", finish_reason="length") == 4
    assert gateway("chasqui_gateway_time_to_first_token_seconds_count") == 4
    for kind in ("prompt_tokens", "cached_prompt_tokens", "completion_tokens"):
        used = sum(getattr(usage, kind) for usage in usages)
        assert gateway(f"chasqui_gateway_{kind}_total", key="") == used
    assert gateway("chasqui_gateway_completion_tokens_total") == 32


CHAT = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "chasqui"}


async def test_requests_of_both_protocols_are_counted_under_opentelemetrys_names(
    chat: Any, stack: Any
) -> None:
    gateway = Difference(stack.gateway)
    served = CHAT | {"gen_ai_request_model": "mha-mp1"}
    dialogs = [Dialog(messages=[Message(role=ROLE_USER, content="a")])]
    request = ChatCompleteRequest(dialogs=dialogs, sampling=exactly(8))
    usage = (await chat.ChatComplete(request)).predictions[0].usage
    with pytest.raises(grpc.aio.AioRpcError):
        await chat.ChatComplete(ChatCompleteRequest(model="x" * 99, dialogs=dialogs))
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "ignore_eos": True}
    async with httpx2.AsyncClient(base_url=stack.gateway.http_url, timeout=60) as http:
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        assert (await http.post("/v1/chat/completions", json=body | {"n": 0})).status_code == 400
    for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
        ok = {"error_type": ""} if name == "request_duration" else {}
        assert gateway(f"gen_ai_server_{name}_seconds_count", **served, **ok) == 2
        assert gateway(f"gen_ai_server_{name}_seconds_sum", **served, **ok) > 0
    refused = {"error_type": "INVALID_ARGUMENT"}
    assert gateway("gen_ai_server_request_duration_seconds_count", **served, **refused) == 1
    unknown = CHAT | {"gen_ai_request_model": "_OTHER", "error_type": "NOT_FOUND"}
    assert gateway("gen_ai_server_request_duration_seconds_count", **unknown) == 1
    for kind, tokens in (("input", usage.prompt_tokens), ("output", 8)):
        labels = served | {"gen_ai_token_type": kind}
        assert gateway("gen_ai_client_token_usage_count", **labels) == 2
        assert gateway("gen_ai_client_token_usage_sum", **labels) == 2 * tokens


def test_tokens_are_counted_by_the_name_of_the_key(locked: Any) -> None:
    gateway = Difference(locked.process)
    with locked.client() as friend:
        answer = friend.complete(PROMPT, max_gen_len=3, ignore_eos=True)
    for kind in ("prompt_tokens", "cached_prompt_tokens", "completion_tokens"):
        used = getattr(answer.usage, kind)
        assert gateway(f"chasqui_gateway_{kind}_total", key="friend") == used
        assert gateway(f"chasqui_gateway_{kind}_total", key="") == 0


async def test_named_streams_without_a_reader_are_counted(
    chat: Any, stack: Any, idle_load: Any
) -> None:
    def detached() -> float:
        return float(stack.gateway.scrape().value("chasqui_gateway_detached_streams"))

    stream = chat.TextCompleteStream(lasting("left"))
    await stream.read()
    assert detached() == 0
    stream.cancel()
    until(lambda: detached() == 1)
    await chat.CancelStream(CancelStreamRequest(stream_name="left"))
    assert detached() == 0
    await idle_load()


async def test_model_counts_its_steps_and_what_they_computed(chat: Any, stack: Any) -> None:
    model = Difference(stack.model)
    request = TextCompleteRequest(prompts=[PROMPT], sampling=exactly(16))
    [prediction] = (await chat.TextComplete(request)).predictions
    cached = model("chasqui_model_cached_prompt_tokens_total")
    assert cached == prediction.usage.cached_prompt_tokens
    prompt_tokens = prediction.usage.prompt_tokens
    assert model("chasqui_model_prompt_tokens_total") == prompt_tokens - cached
    assert model("chasqui_model_completion_tokens_total") == 16
    steps = model("chasqui_model_steps_total")
    assert 0 < steps <= 17
    for part in ("schedule", "forward", "sample"):
        assert model("chasqui_model_step_seconds_count", part=part) == steps
    assert model("chasqui_model_step_sequences_sum") == steps
    now = stack.model.scrape()
    assert now.value("chasqui_model_free_blocks") == now.value("chasqui_model_blocks") > 0
    assert now.value("chasqui_model_running_sequences") == 0


async def test_tokenizer_counts_texts_and_their_tokens(chat: Any, stack: Any) -> None:
    tokenizer = Difference(stack.tokenizer)
    request = TextCompleteRequest(prompts=[PROMPT, "größer"], sampling=exactly(1))
    predictions = (await chat.TextComplete(request)).predictions
    prompt_tokens = sum(prediction.usage.prompt_tokens for prediction in predictions)
    assert tokenizer("chasqui_tokenizer_segments_total") == 2
    assert tokenizer("chasqui_tokenizer_tokens_total") == prompt_tokens
    assert tokenizer("chasqui_tokenizer_bytes_total") == len((PROMPT + "größer").encode())


@pytest.mark.parametrize("echo", [False, True])
async def test_each_delta_is_one_latency(chat: Any, stack: Any, echo: bool) -> None:
    gateway = Difference(stack.gateway)
    request = TextCompleteStreamRequest(prompts=[PROMPT], sampling=exactly(12), echo=echo)
    events = [response.event async for response in chat.TextCompleteStream(request)]
    deltas = [event for event in events if event.HasField("delta")][echo:]
    assert gateway("chasqui_gateway_time_to_first_token_seconds_count") == 1
    assert gateway("chasqui_gateway_inter_token_seconds_count") == len(deltas) - 1 > 0


async def test_cancelled_answers_are_counted_with_the_tokens_they_had(
    chat: Any, stack: Any, idle_load: Any
) -> None:
    gateway = Difference(stack.gateway)
    stream = chat.TextCompleteStream(lasting())
    while not (await stream.read()).event.HasField("delta"):
        pass
    stream.cancel()

    def finished() -> float:
        return gateway("chasqui_gateway_finished_total", finish_reason="length")

    # The cancelled answers are counted last.
    until(lambda: gateway("chasqui_gateway_cancelled_after_tokens_count") + finished() == 64 * 4)
    assert gateway("chasqui_gateway_request_seconds_count", grpc_code="Canceled") == 1
    assert gateway("chasqui_gateway_cancelled_after_tokens_count") > 0
    tokens = gateway("chasqui_gateway_cancelled_after_tokens_sum") + 200 * finished()
    assert tokens == gateway("chasqui_gateway_completion_tokens_total")
    assert 0 < tokens < 64 * 4 * 200
    await idle_load()


async def test_refused_request_is_counted_though_it_made_nothing(chat: Any, stack: Any) -> None:
    gateway = Difference(stack.gateway)
    with pytest.raises(grpc.aio.AioRpcError):
        await chat.TextComplete(TextCompleteRequest())
    until(lambda: gateway("grpc_server_handled_total", grpc_code="InvalidArgument") == 1)
    assert gateway("chasqui_refusals_total", reason="invalid_argument") == 1
    assert gateway("chasqui_gateway_request_seconds_count", grpc_code="InvalidArgument") == 1
    assert gateway("chasqui_gateway_completion_tokens_total") == 0


async def test_what_goes_on_unjudged_is_counted(stack: Any) -> None:
    gateway = start_gateway(
        stack.tokenizer, stack.model, safety_target=UNREACHABLE, safety_on_failure="open"
    )
    try:
        gateway.wait_until(serving=True)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            request = TextCompleteRequest(prompts=[PROMPT], sampling=exactly(1))
            chat: Any = ChatServiceStub(channel)
            await chat.TextComplete(request)
        # The prompt, and the answer.
        assert gateway.scrape().value("chasqui_gateway_unjudged_total") == 2
        assert gateway.scrape().value("chasqui_gateway_safety_ready") == 0
    finally:
        gateway.stop()


async def test_state_of_every_service_is_scraped(chat: Any, stack: Any) -> None:
    await chat.TextComplete(TextCompleteRequest(prompts=[PROMPT], sampling=exactly(1)))
    for service in (stack.gateway, stack.tokenizer, stack.model):
        scrape = service.scrape()
        assert scrape.value("chasqui_serving") == 1
        assert scrape.value("process_resident_memory_bytes") > 1e7
        assert scrape.value("process_open_fds") > 0
    gateway = stack.gateway.scrape()
    replica = {"replica": stack.model.address}
    assert gateway.value("chasqui_gateway_replica_ready", **replica) == 1
    assert gateway.value("chasqui_gateway_replica_state", **replica, state="serving") == 1
    assert gateway.value("chasqui_gateway_replica_state", **replica) == 1
    assert gateway.value("chasqui_gateway_replica_outstanding_tokens", **replica) == 0
    assert gateway.value("chasqui_gateway_running_sequences") == 0
    assert gateway.value("chasqui_calls_in_flight", grpc_service="llama.v1.ChatService") == 0
