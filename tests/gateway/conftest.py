"""A gateway in this process, in front of a real tokenizer service and of model services whose
answers the test writes: what an engine would make is beside the point here.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from gateway.rpc.upstreams import Backend
from gateway.server import gateway_service
from gateway.settings import GatewaySettings
from gateway.text.vocabulary import Vocabulary
from llama.v1 import chat_pb2_grpc, model_pb2, model_pb2_grpc, operator_pb2_grpc
from llama.v1.sampling_pb2 import DETERMINISM_SEEDED, FINISH_REASON_CANCELLED
from safety_service.rules import Rules
from safety_service.server import Classifier, safety_service
from serving.server import Service, channel, running
from serving.settings import ServerSettings
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.server import tokenizer_service
from tokenizer_service.tokenizer import Tokenizer

TOKENIZER_PATH = Path(__file__).parents[1] / "golden" / "tokenizer.model"
CONTEXT_LENGTH = 256


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return open_tokenizer(TOKENIZER_PATH)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    pieces = [(piece.bytes, piece.kind) for piece in tokenizer.vocabulary()]
    return Vocabulary.build(pieces, dummy_prefix=tokenizer.dummy_prefix, eos_ids=tokenizer.eos_ids)


@dataclass
class ScriptedModel(model_pb2_grpc.ModelServiceServicer):
    """A model service that makes what the test tells; a cancelled sequence ends by itself."""

    info: model_pb2.GetModelInfoResponse
    starts: asyncio.Queue[model_pb2.StartSequence] = field(default_factory=asyncio.Queue)
    cancels: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    load: model_pb2.GetLoadResponse = field(default_factory=model_pb2.GetLoadResponse)
    awake: asyncio.Event = field(default_factory=asyncio.Event)  # else GetLoad does not answer
    steps: bool = True
    _made: asyncio.Queue[model_pb2.GenerateResponse] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.awake.set()

    def tell(self, sequence_id: str, **event: Any) -> None:
        """Makes an event of a sequence."""
        events = [model_pb2.TokenEvent(sequence_id=sequence_id, **event)]
        self._made.put_nowait(model_pb2.GenerateResponse(events=events))

    async def GetModelInfo(
        self, _request: model_pb2.GetModelInfoRequest, _context: object
    ) -> model_pb2.GetModelInfoResponse:
        return self.info

    async def GetLoad(
        self, _request: model_pb2.GetLoadRequest, _context: object
    ) -> model_pb2.GetLoadResponse:
        await self.awake.wait()
        self.load.steps += self.steps
        return self.load

    async def Generate(
        self, requests: AsyncIterator[model_pb2.GenerateRequest], _context: object
    ) -> AsyncIterator[model_pb2.GenerateResponse]:
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield await self._made.get()
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[model_pb2.GenerateRequest]) -> None:
        async for request in requests:
            if request.HasField("start"):
                self.starts.put_nowait(request.start)
            else:
                self.cancels.put_nowait(request.cancel.sequence_id)
                self.tell(request.cancel.sequence_id, finish_reason=FINISH_REASON_CANCELLED)

    def service(self) -> Service:
        return Service(
            names=["llama.v1.ModelService"],
            register=lambda server: model_pb2_grpc.add_ModelServiceServicer_to_server(self, server),
        )


@dataclass
class RunningGateway:
    """A gateway under test, as a client sees it."""

    stub: "chat_pb2_grpc.ChatServiceAsyncStub"  # a name for type checkers only
    health: Any
    operator: "operator_pb2_grpc.OperatorServiceAsyncStub"
    address: str
    server: AsyncExitStack  # ends the gateway earlier than the test
    http_url: str = ""

    @classmethod
    def on(
        cls,
        to_gateway: grpc.aio.Channel,
        address: str,
        server: AsyncExitStack,
        http_address: str = "",
    ) -> "RunningGateway":
        return cls(
            stub=chat_pb2_grpc.ChatServiceStub(to_gateway),
            health=health_pb2_grpc.HealthStub(to_gateway),
            operator=operator_pb2_grpc.OperatorServiceStub(to_gateway),
            address=address,
            server=server,
            http_url=f"http://{http_address}",
        )

    async def until(self, serving: bool) -> None:
        """Waits for the gateway's health."""
        wanted = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        watch = self.health.Watch(HealthCheckRequest(service="llama.v1.ChatService"))
        async for response in watch:
            if response.status == wanted:
                watch.cancel()
                return


class Log:
    """The log of this process, for tests that wait for a line."""

    def __init__(self) -> None:
        self._entries: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()

    def __call__(
        self, _logger: object, _method: str, entry: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        self._entries.put_nowait(dict(entry))
        return entry

    async def wait_for(self, event: str) -> MutableMapping[str, Any]:
        """The next entry of an event."""
        while (entry := await self._entries.get())["event"] != event:
            pass
        return entry

    def rest(self) -> list[MutableMapping[str, Any]]:
        """The entries that no test waited for."""
        return [self._entries.get_nowait() for _ in range(self._entries.qsize())]


StartServer = Callable[..., Awaitable[tuple[str, AsyncExitStack]]]
StartGateway = Callable[..., Awaitable[RunningGateway]]


@pytest.fixture
def log() -> Iterator[Log]:
    before = structlog.get_config()["processors"]
    found = Log()
    structlog.configure(processors=[found, *before])
    yield found
    structlog.configure(processors=before)


@pytest.fixture
async def servers() -> AsyncIterator[AsyncExitStack]:
    """Whatever the test starts ends with it, in reverse order."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start_server(servers: AsyncExitStack) -> StartServer:
    """Starts a service; returns its address, and what ends it earlier than the test."""

    async def start(service: Service, **settings: Any) -> tuple[str, AsyncExitStack]:
        own = await servers.enter_async_context(AsyncExitStack())
        settings = {"port": 0, "grace_period": 0, **settings}
        server = await own.enter_async_context(running(ServerSettings(**settings), service))
        return server.address, own

    return start


@pytest.fixture
async def tokenizer_target(tokenizer: Tokenizer, start_server: StartServer) -> str:
    address, _ = await start_server(tokenizer_service(tokenizer))
    return address


@pytest.fixture
def model_info(tokenizer: Tokenizer) -> model_pb2.GetModelInfoResponse:
    return model_pb2.GetModelInfoResponse(
        name="scripted",
        vocab_size=tokenizer.n_words,
        context_length=CONTEXT_LENGTH,
        max_batch_size=64,
        dtype="float32",
        device="cpu",
        fingerprint="weights",
        determinism=DETERMINISM_SEEDED,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )


@pytest.fixture
def model(model_info: model_pb2.GetModelInfoResponse) -> ScriptedModel:
    return ScriptedModel(model_info)


@pytest.fixture
def start_gateway(servers: AsyncExitStack) -> StartGateway:
    async def start(tokenizer: str, *models: str, **settings: Any) -> RunningGateway:
        chosen = GatewaySettings(
            port=0,
            tokenizer_target=tokenizer,
            model_targets=",".join(models),
            **{"grace_period": 0, **settings},
        )
        backend = Backend(
            chosen.tokenizer_target,
            chosen.model_target_list,
            chosen.pool_options,
            safety=chosen.safety_options,
            prompt_format=chosen.prompt_format,
        )
        own = await servers.enter_async_context(AsyncExitStack())
        server = await own.enter_async_context(running(chosen, gateway_service(backend, chosen)))
        to_gateway = await servers.enter_async_context(channel(server.address))
        return RunningGateway.on(to_gateway, server.address, own, server.front_address)

    return start


@pytest.fixture
async def gateway(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> RunningGateway:
    """A gateway in front of `model`, serving."""
    address, _ = await start_server(model.service())
    started = await start_gateway(tokenizer_target, address)
    await started.until(serving=True)
    return started


@dataclass
class GuardedGateway:
    """A gateway under test whose dialogs and answers are judged."""

    stub: "chat_pb2_grpc.ChatServiceAsyncStub"
    operator: "operator_pb2_grpc.OperatorServiceAsyncStub"
    until: Callable[..., Awaitable[None]]
    safety_target: str
    safety_server: AsyncExitStack  # ends the safety service


StartGuarded = Callable[..., Awaitable[GuardedGateway]]


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    """Finds what no test says by accident."""
    path = tmp_path / "rules.toml"
    path.write_text('[spitting]\nterms = ["spit", "two words"]\n[weapons]\nterms = ["bomb"]\n')
    return Rules.read(path)


@pytest.fixture
def start_guarded(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
    rules: Rules,
) -> StartGuarded:
    """Starts a gateway in front of `model` and of a real safety service, by default of `rules`."""

    async def start(
        classifier: Classifier = rules, replica: ScriptedModel = model, **settings: Any
    ) -> GuardedGateway:
        target, server = await start_server(safety_service(classifier))
        address, _ = await start_server(replica.service())
        settings = {"safety_chunk": 10, **settings}
        gateway = await start_gateway(tokenizer_target, address, safety_target=target, **settings)
        await gateway.until(serving=True)
        return GuardedGateway(gateway.stub, gateway.operator, gateway.until, target, server)

    return start
