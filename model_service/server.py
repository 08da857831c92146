"""ModelService over gRPC: the engine of one replica, behind the servicer of its leader.

The engine's thread makes outputs. On the event loop they are sorted by the streams that asked for
them, into one message per stream and step. The engine knows a sequence as (stream, sequence_id), so
streams may use the same ids.
"""

import asyncio
import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import grpc
import structlog

from llama.v1 import model_pb2, model_pb2_grpc, sampling_pb2
from model_service.engine.sequence import SequenceOutput
from model_service.engine.thread import EngineThread
from model_service.loading.distributed import Shards
from model_service.loading.replica import Replica
from model_service.messages import generation_request, token_event
from model_service.telemetry.metrics import EngineMetrics
from model_service.telemetry.spans import SequenceSpans
from serving.errors import RequestError, unavailable
from serving.intake.answering import Context
from serving.server import Health, Service

_log = structlog.stdlib.get_logger(__name__)

SERVICE_NAME = "llama.v1.ModelService"
# SERVING means that a token went through all shards lately; an idle engine sends one every 5 s.
STALL_LIMIT = 30.0  # seconds
HEALTH_INTERVAL = 1.0  # seconds


@dataclass(slots=True, eq=False)
class _Stream:
    """One open Generate call."""

    number: int
    running: set[str] = field(default_factory=set)
    # A message for the caller, the error that ends the call, or None: the call is complete.
    responses: asyncio.Queue[model_pb2.GenerateResponse | RequestError | None] = field(
        default_factory=asyncio.Queue
    )
    complete: bool = False  # no further requests will come

    def end_when_idle(self) -> None:
        if self.complete and not self.running:
            self.responses.put_nowait(None)


def model_service(replica: Replica, tokenizer_fingerprint: str, shards: Shards) -> Service:
    """The service as `serving` runs it, on the current event loop."""
    servicer = ModelServicer(replica, tokenizer_fingerprint, shards)

    def register(server: grpc.aio.Server) -> None:
        model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)

    return Service(
        names=[SERVICE_NAME],
        register=register,
        run=servicer.run,
        drain=servicer.drain,
        collectors=[servicer.metrics],
    )


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Serves one replica."""

    def __init__(self, replica: Replica, tokenizer_fingerprint: str, shards: Shards) -> None:
        self._replica = replica
        self._shards = shards
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._streams: dict[int, _Stream] = {}
        self._stream_numbers = itertools.count()
        self._draining = False
        self._idle = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[Exception] = self._loop.create_future()
        self._engine = EngineThread(replica.engine(), self._deliver, self._fail)
        self._spans = SequenceSpans()
        self.metrics = EngineMetrics(self._engine, replica.info)

    async def Generate(
        self,
        request_iterator: AsyncIterator[model_pb2.GenerateRequest],
        context: Context,
    ) -> AsyncIterator[model_pb2.GenerateResponse]:
        stream = _Stream(next(self._stream_numbers))
        self._streams[stream.number] = stream
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while (response := await stream.responses.get()) is not None:
                if isinstance(response, RequestError):
                    raise response
                yield response
        finally:
            reader.cancel()
            del self._streams[stream.number]
            for sequence_id in stream.running:
                self._engine.cancel((stream.number, sequence_id))

    async def GetModelInfo(
        self,
        request: model_pb2.GetModelInfoRequest,
        context: Context,
    ) -> model_pb2.GetModelInfoResponse:
        info = self._replica.info
        on_the_wire = {
            "determinism": sampling_pb2.Determinism.Value(f"DETERMINISM_{info.determinism.name}"),
            "quantization": "" if info.quantization == "none" else info.quantization,
            "tokenizer_fingerprint": self._tokenizer_fingerprint,
        }
        return model_pb2.GetModelInfoResponse(**(dataclasses.asdict(info) | on_the_wire))

    async def GetLoad(
        self,
        request: model_pb2.GetLoadRequest,
        context: Context,
    ) -> model_pb2.GetLoadResponse:
        load = self._engine.load
        fields = dataclasses.asdict(load)
        del fields["drafts"]
        return model_pb2.GetLoadResponse(
            block_size=self._engine.limits.block_size,
            drafted_tokens=load.drafted_tokens,
            accepted_tokens=load.accepted_tokens,
            **fields,
        )

    async def _read(
        self, stream: _Stream, requests: AsyncIterator[model_pb2.GenerateRequest]
    ) -> None:
        """Passes a stream's commands to the engine until the caller sends no more."""
        try:
            async for request in requests:
                match request.WhichOneof("command"):
                    case "start":
                        self._start(stream, request.start)
                    case "cancel":
                        self._engine.cancel((stream.number, request.cancel.sequence_id))
        except RequestError as error:
            stream.responses.put_nowait(error)
        stream.complete = True
        stream.end_when_idle()

    def _start(self, stream: _Stream, start: model_pb2.StartSequence) -> None:
        try:
            if self._draining:
                raise unavailable("this replica is draining")
            if start.sequence_id in stream.running:
                raise RequestError(
                    grpc.StatusCode.ALREADY_EXISTS, f"sequence_id {start.sequence_id!r} is running"
                )
            request = generation_request(start, stream.number, self._engine.limits)
        except RequestError as error:
            failure = model_pb2.SequenceError(code=error.code.value[0], message=error.message)
            event = model_pb2.TokenEvent(sequence_id=start.sequence_id, error=failure)
            stream.responses.put_nowait(model_pb2.GenerateResponse(events=[event]))
            return
        stream.running.add(start.sequence_id)
        self._idle.clear()
        self._spans.begin(request.request_id, start)
        self._engine.start(request)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[SequenceOutput]) -> None:
        events = defaultdict(list)
        for output in outputs:
            self._spans.on_output(output)
            number, sequence_id = cast(tuple[int, str], output.request_id)  # as `_start` made it
            stream = self._streams.get(number)
            if stream is None:  # the call has ended, and its sequences are cancelled
                continue
            events[stream].append(token_event(sequence_id, output))
            if output.finish_reason is not None:
                stream.running.discard(sequence_id)
        for stream, made in events.items():
            stream.responses.put_nowait(model_pb2.GenerateResponse(events=made))
            stream.end_when_idle()
        if not any(stream.running for stream in self._streams.values()):
            self._idle.set()

    def _fail(self, error: Exception) -> None:
        """Called at the end of the engine's thread."""
        self._loop.call_soon_threadsafe(self._failure.set_result, error)

    async def run(self, health: Health) -> None:
        """Runs the engine and updates the health until it is cancelled, when no RPC is left.

        Raises if the engine has failed.
        """
        self._engine.run()
        try:
            while not self._failure.done():
                await health.set_serving(self._engine.answered and not self._stalled())
                await asyncio.wait({self._failure}, timeout=HEALTH_INTERVAL)
        finally:
            self._engine.stop()
        await health.set_serving(False)
        for stream in self._streams.values():
            stream.responses.put_nowait(unavailable("the replica has failed"))
        raise self._shards.failure(self._failure.result())

    def _stalled(self) -> bool:
        return time.monotonic() - self._engine.last_step_at > STALL_LIMIT

    async def drain(self) -> None:
        """Lets running sequences finish, then ends the streams."""
        self._draining = True
        if any(stream.running for stream in self._streams.values()):
            await self._idle.wait()
        for stream in self._streams.values():
            stream.responses.put_nowait(None)
