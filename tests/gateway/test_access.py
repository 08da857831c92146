"""TLS between the services, and clients that do not read."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from gateway.rpc.upstreams import Backend
from gateway.server import gateway_service
from gateway.settings import GatewaySettings
from gateway.upstream.connect import connector, failure_reason
from llama.v1 import chat_pb2
from llama.v1.model_pb2 import TopLogprobs
from llama.v1.sampling_pb2 import FINISH_REASON_STOP
from llama.v1.tokenizer_pb2 import GetVocabularyRequest
from llama.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from safety_service.rules import Rules
from safety_service.server import safety_service
from serving.server import Running, channel, running
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer
from tokenizer_service.server import tokenizer_service
from tokenizer_service.tokenizer import Tokenizer

REQUEST = chat_pb2.TextCompleteStreamRequest(prompts=["Llamas"])


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    """Files of one authority, and of one certificate by it that names no address."""
    authority = trustme.CA()
    issued = authority.issue_cert("inside.example")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    return files


async def test_services_inside_talk_mutual_tls(
    pem: dict[str, Path],
    tokenizer: Tokenizer,
    model: ScriptedModel,
    start_server: StartServer,
    servers: AsyncExitStack,
) -> None:
    tls = {"tls_cert": pem["cert"], "tls_key": pem["key"], "tls_client_ca": pem["ca"]}
    upstreams = {"upstream_cert": pem["cert"], "upstream_key": pem["key"], "upstream_ca": pem["ca"]}
    to_tokenizer, _ = await start_server(tokenizer_service(tokenizer), **tls)
    to_model, _ = await start_server(model.service(), **tls)
    named: Any = {**upstreams, "upstream_name": "inside.example"}
    settings = GatewaySettings(port=0, grace_period=0, **named)
    backend = Backend(
        to_tokenizer,
        [to_model],
        settings.pool_options,
        connector(settings.upstream_tls, settings.upstream_name),
    )
    server: Running = await servers.enter_async_context(
        running(settings, gateway_service(backend, settings))
    )
    async with channel(server.address) as to_gateway:
        gateway = RunningGateway.on(to_gateway, server.address, servers)
        await gateway.until(serving=True)
        assert (await gateway.stub.GetModel(chat_pb2.GetModelRequest())).name == "scripted"


@pytest.mark.parametrize(
    ("service_settings", "gateway_settings", "meaning"),
    [
        ([], ["upstream_ca"], "it speaks plaintext; --upstream_ca makes this gateway speak TLS"),
        (
            ["tls_cert", "tls_key"],
            [],
            "it may speak TLS or ask for a certificate: set --upstream_ca",
        ),
        (
            ["tls_cert", "tls_key"],
            ["upstream_ca"],
            "its certificate has another name: set --upstream_name",
        ),
        (
            ["tls_cert", "tls_key", "tls_client_ca"],
            ["upstream_ca", "upstream_name"],
            "it may speak TLS or ask for a certificate: set --upstream_ca, --upstream_cert",
        ),
    ],
)
async def test_gateway_says_which_side_speaks_tls(
    pem: dict[str, Path],
    tokenizer: Tokenizer,
    start_server: StartServer,
    service_settings: list[str],
    gateway_settings: list[str],
    meaning: str,
) -> None:
    values: dict[str, Any] = {"tls_client_ca": pem["ca"], "upstream_name": "inside.example"}
    values |= {f"{side}_{name}": file for side in ("tls", "upstream") for name, file in pem.items()}
    chosen = {name: values[name] for name in service_settings}
    target, _ = await start_server(tokenizer_service(tokenizer), **chosen)
    settings = GatewaySettings(**{name: values[name] for name in gateway_settings})
    async with connector(settings.upstream_tls, settings.upstream_name)(target) as to_tokenizer:
        stub = TokenizerServiceStub(to_tokenizer)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetVocabulary(GetVocabularyRequest())
    assert meaning in failure_reason(refused.value)


async def test_services_show_the_names_that_their_targets_have(
    tmp_path: Path,
    tokenizer: Tokenizer,
    model: ScriptedModel,
    start_server: StartServer,
    servers: AsyncExitStack,
) -> None:
    services, gateways = trustme.CA(), trustme.CA()
    for name, authority in (("services", services), ("gateways", gateways)):
        authority.cert_pem.write_to_path(tmp_path / name)
    pair = tmp_path / "localhost", tmp_path / "gateway"
    services.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pair[0])
    gateways.issue_cert("a.gateway").private_key_and_cert_chain_pem.write_to_path(pair[1])
    tls = {"tls_cert": pair[0], "tls_key": pair[0], "tls_client_ca": tmp_path / "gateways"}
    to_tokenizer, to_model = [
        (await start_server(service, **tls))[0].replace("127.0.0.1", "localhost")
        for service in (tokenizer_service(tokenizer), model.service())
    ]
    upstreams: Any = {
        "upstream_cert": pair[1],
        "upstream_key": pair[1],
        "upstream_ca": tmp_path / "services",
    }
    settings = GatewaySettings(port=0, grace_period=0, **upstreams)
    targets = [f"dns:///{to_model}"]
    backend = Backend(
        to_tokenizer,
        targets,
        settings.pool_options,
        connector(settings.upstream_tls, settings.upstream_name),
    )
    service = gateway_service(backend, settings)
    server: Running = await servers.enter_async_context(running(settings, service))
    async with channel(server.address) as to_gateway:
        await RunningGateway.on(to_gateway, server.address, servers).until(serving=True)


@pytest.fixture(params=[False, True], ids=["unjudged", "judged"])
async def impatient(
    request: pytest.FixtureRequest,
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    rules: Rules,
) -> RunningGateway:
    """A gateway that keeps little for who does not read, with and without a classifier."""
    address, _ = await start_server(model.service())
    bounds: dict[str, Any] = {"max_unread_bytes": 4096, "stream_buffer_bytes": 4096}
    if request.param:
        bounds["safety_target"], _ = await start_server(safety_service(rules))
    gateway = await start_gateway(tokenizer_target, address, **bounds)
    await gateway.until(serving=True)
    return gateway


@pytest.mark.parametrize("name", ["", "named"])
async def test_client_that_stops_reading_loses_its_stream_at_the_bound(
    name: str, impatient: RunningGateway, model: ScriptedModel
) -> None:
    request = chat_pb2.TextCompleteStreamRequest(
        prompts=["Llamas"], stream_name=name, logprobs=True, top_logprobs=20
    )
    call = impatient.stub.TextCompleteStream(request)
    sequence = (await model.starts.get()).sequence_id
    cancelled = asyncio.create_task(model.cancels.get())
    top = TopLogprobs(ids=[300] * 20, logprobs=[0] * 20)  # much to send, little to judge
    while not cancelled.done():
        model.tell(sequence, ids=[300] * 10, logprobs=[0.0] * 10, top=[top] * 10)
        await asyncio.sleep(0)
    assert cancelled.result() == sequence
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in call:
            pass
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "reads too slowly" in str(ended.value.details())


async def test_slow_but_steady_reader_gets_everything(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_unread_bytes=4096)
    await gateway.until(serving=True)
    call: Any = gateway.stub.TextCompleteStream(REQUEST)
    sequence = (await model.starts.get()).sequence_id
    await call.read()
    for _ in range(100):
        model.tell(sequence, ids=[300] * 100)
        assert (await call.read()).event.delta.text
    model.tell(sequence, finish_reason=FINISH_REASON_STOP)
    assert (await call.read()).event.finished.usage.completion_tokens == 10_000
