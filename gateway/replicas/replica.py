"""A session with one replica of the model.

It has one long-lived Generate stream for all sequences that run there. Each engine step returns one
message, whose events are dispatched to their generations here, so work per event must stay small.
Every sequence gets exactly one last event, with a finish reason or an error: if the replica is lost
before it sent one, it is made here.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn, Protocol

import grpc
import structlog

from gateway.replicas.load_reports import LoadReports
from gateway.replicas.prefix_index import BLOCK, PrefixIndex
from gateway.upstream.connect import Connect, connected
from gateway.upstream.session import Upstream, UpstreamError, follow_health, keep_session
from llama.v1 import model_pb2, model_pb2_grpc
from llama.v1.operator_pb2 import UPSTREAM_STATE_CONNECTING, UPSTREAM_STATE_NOT_SERVING

SERVICE = "llama.v1.ModelService"
MAX_INDEXED_BLOCKS = 65_536  # a million tokens; each block takes about 150 bytes here

# Raises UpstreamError if a replica does not fit.
Check = Callable[[model_pb2.GetModelInfoResponse], None]

_log = structlog.stdlib.get_logger(__name__)


class Generation(Protocol):
    """The part of a generation that the client of its replica uses."""

    @property
    def outstanding_tokens(self) -> int:
        """Tokens of prompt and answer that the replica may still have to compute."""

    def on_event(self, event: model_pb2.TokenEvent, now: float) -> bool:
        """Handles an event received at `now` (time.monotonic); returns whether it was the last."""


class ReplicaClient:
    """A session with one model service; `changed` is called when `ready` may have changed."""

    def __init__(
        self,
        target: str,
        check: Check,
        changed: Callable[[], None],
        hang_timeout: float,
        connect: Connect,
        *,
        name: str | None = None,
    ) -> None:
        """A replica that does not answer for `hang_timeout` seconds counts as lost. `name` is the
        DNS name that the target was resolved from.
        """
        self.upstream = Upstream(target, changed)
        self.info: model_pb2.GetModelInfoResponse | None = None  # while a session lasts
        self.load = LoadReports(hang_timeout, self._on_load)
        self.retired = False  # removed from the targets: it only finishes what it runs
        self.prefixes = PrefixIndex(MAX_INDEXED_BLOCKS)
        self._check = check
        self._hang_timeout = hang_timeout
        self._connect = connect
        self._name = name
        self._sequences: dict[str, Generation] = {}
        self._numbers = itertools.count(1)
        self._commands: asyncio.Queue[model_pb2.GenerateRequest] = asyncio.Queue()
        self._last_event_at = 0.0

    @property
    def target(self) -> str:
        return self.upstream.target

    @property
    def ready(self) -> bool:
        """Whether it takes new sequences."""
        return self.upstream.serving and self.info is not None and not self.retired

    @property
    def sequences(self) -> int:
        """The number of this gateway's sequences there."""
        return len(self._sequences)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that it may still have to compute for this gateway; readable from any thread."""
        return sum(each.outstanding_tokens for each in [*self._sequences.values()])

    async def run(self) -> NoReturn:
        """Keeps a session; ends when cancelled."""
        _log.info("connecting to replica", upstream=self.target)
        await keep_session(self.upstream, self._session)

    def start(
        self, start: model_pb2.StartSequence, request_id: str | None, generation: Generation
    ) -> str:
        """Starts a sequence, without waiting; returns its id, which is unique on the stream."""
        start.sequence_id = f"{request_id}.{next(self._numbers)}"
        if not self._sequences:
            self._last_event_at = time.monotonic()  # steps are expected from now on
        self._sequences[start.sequence_id] = generation
        self._commands.put_nowait(model_pb2.GenerateRequest(start=start))
        return start.sequence_id

    def cancel(self, sequence_id: str) -> None:
        """Requests an early end; the last event is still delivered. No effect after the end."""
        cancel = model_pb2.CancelSequence(sequence_id=sequence_id)
        self._commands.put_nowait(model_pb2.GenerateRequest(cancel=cancel))

    def refused(self) -> None:
        """Marks it as not serving, before its health service says so: it refused a sequence."""
        self.upstream.become(UPSTREAM_STATE_NOT_SERVING, "it refused a sequence: it drains")

    async def _session(self) -> None:
        async with connected(self._connect, self.target, self._name) as channel:
            await self._serve_over(channel)

    async def _serve_over(self, channel: grpc.aio.Channel) -> None:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.GetModelInfoRequest()
        info = await stub.GetModelInfo(request, timeout=self._hang_timeout)
        self._check(info)
        self.info = info
        _log.info("replica connected", upstream=self.target, model=info.name, shards=info.shards)
        self._commands = asyncio.Queue()
        call = stub.Generate(_iterate(self._commands))
        # No TaskGroup: before Python 3.13, one that fails while being cancelled is not cancelled.
        tasks = [
            asyncio.create_task(follow_health(channel, SERVICE, self.upstream)),
            asyncio.create_task(self._dispatch(call)),
            asyncio.create_task(self.load.follow(stub, self._expecting_since)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            call.cancel()
            self._lose()
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _dispatch(
        self,
        call: grpc.aio.StreamStreamCall[model_pb2.GenerateRequest, model_pb2.GenerateResponse],
    ) -> NoReturn:
        async for response in call:
            self._last_event_at = now = time.monotonic()
            sequences = self._sequences
            for event in response.events:
                generation = sequences.get(event.sequence_id)
                if generation is None:
                    unknown = event.sequence_id
                    _log.warning("event of an unknown sequence", upstream=self.target, id=unknown)
                elif generation.on_event(event, now):
                    del sequences[event.sequence_id]
        raise UpstreamError("the Generate stream ended")

    def _expecting_since(self) -> float | None:
        """When the last event came, while further ones are expected."""
        return self._last_event_at if self._sequences else None

    def _on_load(self, load: model_pb2.GetLoadResponse) -> None:
        self.prefixes.resize(min(load.total_blocks * load.block_size // BLOCK, MAX_INDEXED_BLOCKS))

    def _lose(self) -> None:
        """Fails the sequences that still run, which the next session does not know."""
        self.info = self.load.latest = None
        self.prefixes.clear()
        lost, self._sequences = self._sequences, {}
        # First, so that these sequences are not sent to this replica again.
        self.upstream.become(UPSTREAM_STATE_CONNECTING, "the session broke")
        if lost:
            _log.warning("replica lost", upstream=self.target, sequences=len(lost))
        error = model_pb2.SequenceError(
            code=grpc.StatusCode.UNAVAILABLE.value[0],
            message="the model replica was lost while it generated the answer",
        )
        now = time.monotonic()
        for sequence_id, generation in lost.items():
            generation.on_event(model_pb2.TokenEvent(sequence_id=sequence_id, error=error), now)


async def _iterate(
    commands: asyncio.Queue[model_pb2.GenerateRequest],
) -> AsyncIterator[model_pb2.GenerateRequest]:
    while True:
        yield await commands.get()
