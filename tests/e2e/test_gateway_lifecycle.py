"""Services that end and come back; each test has its own, as it ends some of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import psutil
import pytest

from llama.v1.chat_pb2 import (
    GetModelRequest,
    Prediction,
    TextCompleteRequest,
    TextCompleteStreamRequest,
)
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.sampling_pb2 import FINISH_REASON_LENGTH, SamplingParams

SEEDED = SamplingParams(temperature=0.8, seed=17, max_gen_len=30)


@pytest.fixture(scope="module")
def own(services: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    with services("gqa-mp1") as stack:
        yield stack


def continue_text(stub: ChatServiceStub) -> Prediction:
    request = TextCompleteRequest(prompts=["The llama is"], sampling=SEEDED)
    return stub.TextComplete(request).predictions[0]


def test_restarted_model_service_is_used_again_and_repeats_a_seeded_answer(own: Any) -> None:
    with grpc.insecure_channel(own.gateway.address) as channel:
        stub = ChatServiceStub(channel)
        before = continue_text(stub)
        assert own.model.stop() == 0
        own.gateway.wait_until(serving=False)
        with pytest.raises(grpc.RpcError, match="no model replica is available"):
            continue_text(stub)
        with own.model.again():
            own.gateway.wait_until(serving=True)
            after = continue_text(stub)
    assert (after.text, after.fingerprint) == (before.text, before.fingerprint)


def local_ports(address: str) -> set[int]:
    """The local ports of this process's connections to a server."""
    own = psutil.Process().net_connections("tcp4")
    port = int(address.rpartition(":")[2])
    return {each.laddr.port for each in own if each.raddr and each.raddr.port == port}


def test_old_connection_is_replaced_and_no_call_notices(
    gateway_beside: Callable[..., Any],
) -> None:
    address = gateway_beside(max_connection_age=1).address
    with grpc.insecure_channel(address) as channel:
        stub = ChatServiceStub(channel)
        stub.GetModel(GetModelRequest())
        first = local_ports(address)
        while local_ports(address) & first:
            stub.GetModel(GetModelRequest())
            time.sleep(0.05)  # between calls; the connection ages by itself
        assert stub.GetModel(GetModelRequest()).replicas == 1


def test_running_stream_finishes_while_the_gateway_drains(own: Any) -> None:
    endless = SamplingParams(ignore_eos=True, max_gen_len=250)
    request = TextCompleteStreamRequest(prompts=["The"], sampling=endless)
    with own.model.again(), grpc.insecure_channel(own.gateway.address) as channel:
        own.gateway.wait_until(serving=True)
        events = ChatServiceStub(channel).TextCompleteStream(request)
        next(events)
        own.gateway.terminate()
        *_, last = events
        assert last.event.finished.finish_reason == FINISH_REASON_LENGTH
        assert own.gateway.stop() == 0
