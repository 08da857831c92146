"""Traces as an OTLP collector gets them."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from llama.v1 import chat_pb2_grpc
from llama.v1.chat_pb2 import TextCompleteRequest
from llama.v1.sampling_pb2 import SamplingParams
from tests.e2e.deployments import Stack
from tests.e2e.processes import start_gateway

GATEWAY = "llama.v1.ChatService"
TOKENIZER = "llama.v1.TokenizerService"
MODEL = "llama.v1.ModelService"
PROMPT = "The llama walks over the bridge"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = "11111111111111111111111111111111"
FRIENDS, WITHOUT_KEY = "22222222222222222222222222222222", "33333333333333333333333333333333"
FORCED = "00000000000000000000000000000001"  # one that a ratio of trace ids always samples
KEY = "a key that is long enough"


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    spans: list[tuple[str, Span]] = field(default_factory=list)  # with the service's name

    def Export(self, request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            [service] = [
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            ]
            self.spans += [(service, span) for s in resource.scope_spans for span in s.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace, by service."""
        return {s: span for s, span in self.spans if span.trace_id.hex() == trace_id}


def attributes(span: Span) -> dict[str, Any]:
    values = {each.key: each.value for each in span.attributes}
    return {key: getattr(v, v.WhichOneof("value") or "") for key, v in values.items()}


@pytest.fixture(scope="module")
def collector(
    services: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collector]:
    """The spans of three calls, completions of 8 tokens; the first and second have a trace of their
    caller's, which the caller does not sample for the second. Further, of a call to
    a gateway that samples what its callers sample and asks for keys, and of another that has none;
    and of one to a gateway that samples nothing.
    """
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    add_to_server: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    every = {"otlp_endpoint": f"http://127.0.0.1:{port}"}
    with services("mha-mp1", every=every) as stack:
        complete(stack.gateway.address, ("traceparent", f"00-{TRACE}-{CALLER}-01"))
        complete(stack.gateway.address, ("traceparent", f"00-{UNSAMPLED}-{CALLER}-00"))
        complete(stack.gateway.address, ("traceparent", "no such thing"))
        call_with_and_without_key(stack, tmp_path_factory.mktemp("keys") / "keys.toml", every)
        call_where_nothing_is_sampled(stack, every)
    yield found  # the services have ended, and sent all that they had
    server.stop(None)


def complete(address: str, *metadata: tuple[str, str]) -> None:
    sampling = SamplingParams(temperature=0, max_gen_len=8, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        stub: Any = chat_pb2_grpc.ChatServiceStub(channel)
        request = TextCompleteRequest(prompts=[PROMPT], sampling=sampling)
        stub.TextComplete(request, metadata=metadata)


def call_with_and_without_key(stack: Stack, keys: Path, every: dict[str, str]) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys.write_text(f'[[keys]]\nname = "friend"\nsha256 = "{digest}"\n')
    sampling = {"trace_ratio": 0, "trust_traceparent": True}
    gateway = start_gateway(stack.tokenizer, stack.model, api_keys=keys, **sampling, **every)
    try:
        gateway.wait_until(serving=True)
        authorization = ("authorization", f"Bearer {KEY}")
        parent = f"00-{FRIENDS}-{CALLER}-01"
        complete(gateway.address, ("traceparent", parent), authorization)
        with pytest.raises(grpc.RpcError):
            complete(gateway.address, ("traceparent", parent.replace(FRIENDS, WITHOUT_KEY)))
    finally:
        gateway.stop()


def call_where_nothing_is_sampled(stack: Stack, every: dict[str, str]) -> None:
    gateway = start_gateway(stack.tokenizer, stack.model, trace_ratio=0, **every)
    try:
        gateway.wait_until(serving=True)
        complete(gateway.address, ("traceparent", f"00-{FORCED}-{CALLER}-01"))
    finally:
        gateway.stop()


def test_one_call_is_one_trace_over_all_services(collector: Collector) -> None:
    trace = collector.trace(TRACE)
    assert set(trace) == {GATEWAY, TOKENIZER, MODEL}
    assert trace[GATEWAY].parent_span_id.hex() == CALLER
    assert trace[TOKENIZER].parent_span_id == trace[GATEWAY].span_id
    assert trace[MODEL].parent_span_id == trace[GATEWAY].span_id
    names = {service: span.name for service, span in trace.items()}
    assert names == {
        GATEWAY: f"{GATEWAY}/TextComplete",
        TOKENIZER: f"{TOKENIZER}/Encode",
        MODEL: f"{MODEL}/Generate",
    }


def test_spans_tell_tokens_and_the_first_of_them(collector: Collector) -> None:
    trace = collector.trace(TRACE)
    for service in (GATEWAY, MODEL):
        told = attributes(trace[service])
        assert told["gen_ai.usage.input_tokens"] > 0
        assert told["gen_ai.usage.cache_read.input_tokens"] == 0
        assert told["gen_ai.usage.output_tokens"] == 8
        [reason] = told["gen_ai.response.finish_reasons"].values
        assert reason.string_value == "length"
    [event] = trace[MODEL].events
    assert event.name == "first token"
    assert trace[MODEL].start_time_unix_nano < event.time_unix_nano
    assert event.time_unix_nano < trace[MODEL].end_time_unix_nano
    assert attributes(trace[GATEWAY])["rpc.grpc.status_code"] == 0


def test_callers_decision_not_to_sample_holds(collector: Collector) -> None:
    assert not collector.trace(UNSAMPLED)


def test_callers_decision_to_sample_does_not_go_beyond_the_ratio(collector: Collector) -> None:
    assert not collector.trace(FORCED)


def test_untrusted_clients_call_joins_no_trace(collector: Collector) -> None:
    assert set(collector.trace(FRIENDS)) == {GATEWAY, TOKENIZER, MODEL}
    assert not collector.trace(WITHOUT_KEY)


def test_malformed_context_begins_a_trace_of_its_own(collector: Collector) -> None:
    gateways = [span for _, span in collector.spans if span.name == f"{GATEWAY}/TextComplete"]
    [own] = [span for span in gateways if span.trace_id.hex() not in {TRACE, FRIENDS}]
    assert not own.parent_span_id
    assert set(collector.trace(own.trace_id.hex())) == {GATEWAY, TOKENIZER, MODEL}


def test_spans_hold_nothing_that_was_said(collector: Collector) -> None:
    assert collector.spans
    assert not any("llama walks" in str(span) for _, span in collector.spans)
