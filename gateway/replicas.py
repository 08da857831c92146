"""The replicas of the model and the choice among them. Each has one long-lived Generate stream for
all sequences it runs; one message per engine step comes back and is handed out here, so work per
event must stay small. Every sequence gets exactly one last event, with a finish reason or an error:
where the replica is lost before it sent one, it is made here.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import grpc
import structlog

from gateway.peer import Connect, PeerError, connected, follow_health, keep_session
from llama.v1 import model_pb2, model_pb2_grpc
from serving import request_id
from serving.errors import RequestError, unavailable

SERVICE = "llama.v1.ModelService"

Deliver = Callable[[model_pb2.TokenEvent], None]
# Raises PeerError where a replica does not fit.
Check = Callable[[model_pb2.GetModelInfoResponse], None]

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A sequence at a replica."""

    request_id: str
    deliver: Deliver
    outstanding_tokens: int  # of prompt and answer, still to be computed
    unreported_tokens: int  # of the prompt, computed with the first event but not among its ids
    commands: asyncio.Queue[model_pb2.GenerateRequest]

    def cancel(self) -> None:
        """Asks for an early end; the last event still comes. Harmless after the end."""
        cancel = model_pb2.CancelSequence(request_id=self.request_id)
        self.commands.put_nowait(model_pb2.GenerateRequest(cancel=cancel))


class Replica:
    """A session with one model service; `changed` is called when `ready` may have changed."""

    def __init__(
        self, target: str, check: Check, changed: Callable[[], None], connect: Connect
    ) -> None:
        self.target = target
        self.info: model_pb2.GetModelInfoResponse | None = None  # while a session lasts
        self.outstanding_tokens = 0
        self._check = check
        self._changed = changed
        self._connect = connect
        self._serving = False
        self._sequences: dict[str, RunningSequence] = {}
        self._commands: asyncio.Queue[model_pb2.GenerateRequest] = asyncio.Queue()

    @property
    def ready(self) -> bool:
        return self._serving

    async def run(self) -> NoReturn:
        """Keeps a session; ends when cancelled."""
        _log.info("connecting to replica", peer=self.target)
        await keep_session(self.target, self._session)

    def start(self, start: model_pb2.StartSequence, deliver: Deliver) -> RunningSequence:
        """Sends a sequence on its way; never waits."""
        tokens = len(start.prompt_ids) + start.sampling.max_gen_len - start.offset
        unreported = 0 if start.prompt_logprobs else len(start.prompt_ids)
        sequence = RunningSequence(start.request_id, deliver, tokens, unreported, self._commands)
        self._sequences[start.request_id] = sequence
        self.outstanding_tokens += tokens
        self._commands.put_nowait(model_pb2.GenerateRequest(start=start))
        return sequence

    async def _session(self) -> None:
        async with connected(self._connect, self.target) as channel:
            await self._serve_over(channel)

    async def _serve_over(self, channel: grpc.aio.Channel) -> None:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        info = await stub.GetModelInfo(model_pb2.GetModelInfoRequest())
        self._check(info)
        self.info = info
        _log.info("replica connected", peer=self.target, model=info.name, shards=info.shards)
        self._commands = asyncio.Queue()
        call = stub.Generate(_iterate(self._commands))
        # No TaskGroup: before Python 3.13, one that fails while it is cancelled forgets the latter.
        tasks = [
            asyncio.create_task(follow_health(channel, SERVICE, self._set_serving)),
            asyncio.create_task(self._dispatch(call)),
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
            for event in response.events:
                self._take(event)
        raise PeerError("the Generate stream ended")

    def _take(self, event: model_pb2.TokenEvent) -> None:
        sequence = self._sequences.get(event.request_id)
        if sequence is None:
            _log.warning("event of an unknown sequence", peer=self.target, id=event.request_id)
            return
        made = sequence.unreported_tokens + len(event.ids)
        sequence.unreported_tokens = 0
        if event.finish_reason or event.HasField("error"):
            del self._sequences[event.request_id]
            made = sequence.outstanding_tokens
        sequence.outstanding_tokens -= made
        self.outstanding_tokens -= made
        sequence.deliver(event)

    def _lose(self) -> None:
        """What still runs is over: the next session knows nothing of it."""
        self.info = None
        lost, self._sequences = self._sequences, {}
        self.outstanding_tokens = 0
        self._set_serving(False)
        error = model_pb2.SequenceError(
            code=grpc.StatusCode.UNAVAILABLE.value[0],
            message="the model replica was lost while it made the answer",
        )
        for sequence in lost.values():
            sequence.deliver(model_pb2.TokenEvent(request_id=sequence.request_id, error=error))

    def _set_serving(self, serving: bool) -> None:
        self._serving = serving
        self._changed()


class ReplicaPool:
    """All replicas that were named, each with its own session."""

    def __init__(
        self, targets: Sequence[str], changed: Callable[[], None], connect: Connect
    ) -> None:
        self._replicas = [Replica(target, self._check, changed, connect) for target in targets]
        self._numbers = itertools.count(1)
        self._tokenizer_fingerprint = ""
        self._vocab_size = 0

    @property
    def replicas(self) -> Sequence[Replica]:
        return self._replicas

    @property
    def ready_count(self) -> int:
        return sum(replica.ready for replica in self._replicas)

    @property
    def places(self) -> int:
        """Sequences that the ready replicas run at once."""
        infos = (replica.info for replica in self._replicas if replica.ready)
        return sum(info.max_batch_size for info in infos if info is not None)

    @property
    def model(self) -> model_pb2.GetModelInfoResponse:
        """What the ready replicas serve, all of them the same; UNAVAILABLE when there are none."""
        for replica in self._replicas:
            if replica.ready and replica.info is not None:
                return replica.info
        raise _no_replica()

    def start(self, start: model_pb2.StartSequence, deliver: Deliver) -> RunningSequence:
        """Starts a sequence on the ready replica with the least outstanding tokens.

        Its request_id is made here, as it must be unique on the replica's stream.
        """
        start.request_id = f"{request_id.current()}.{next(self._numbers)}"
        return self._least_loaded().start(start, deliver)

    async def run(self, tokenizer_fingerprint: str, vocab_size: int) -> None:
        """Keeps a session with each replica that fits this tokenizer; ends when cancelled."""
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        async with asyncio.TaskGroup() as tasks:
            for replica in self._replicas:
                tasks.create_task(replica.run())

    def _least_loaded(self) -> Replica:
        ready = [replica for replica in self._replicas if replica.ready]
        if not ready:
            raise _no_replica()
        return min(ready, key=lambda replica: replica.outstanding_tokens)

    def _check(self, info: model_pb2.GetModelInfoResponse) -> None:
        theirs, ours = info.tokenizer_fingerprint, self._tokenizer_fingerprint
        if theirs and ours and theirs != ours:
            raise PeerError(
                f"refused: it was given the tokenizer {theirs[:12]}, the tokenizer service has "
                f"{ours[:12]}; start both with the same tokenizer_path"
            )
        if info.vocab_size != self._vocab_size:
            raise PeerError(
                f"refused: its embedding has {info.vocab_size} rows, the tokenizer service has "
                f"{self._vocab_size} tokens; checkpoint and tokenizer do not belong together"
            )
        for other in self._replicas:
            if other.info is not None and _identity(other.info) != _identity(info):
                raise PeerError(
                    f"refused: it serves {_describe(info)}, but {other.target} serves "
                    f"{_describe(other.info)}; all replicas must serve the same"
                )


def _no_replica() -> RequestError:
    return unavailable("no model replica is available")


def _identity(info: model_pb2.GetModelInfoResponse) -> tuple[str, int]:
    return info.fingerprint, info.context_length


def _describe(info: model_pb2.GetModelInfoResponse) -> str:
    return f"{info.name} (fingerprint {info.fingerprint}, context length {info.context_length})"


async def _iterate(
    commands: asyncio.Queue[model_pb2.GenerateRequest],
) -> AsyncIterator[model_pb2.GenerateRequest]:
    while True:
        yield await commands.get()
