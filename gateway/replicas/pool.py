"""The pool of model replicas: its members, and which of them runs a generation.

Invariant: a generation that is placed here gets its last event, whatever happens to the replicas.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from gateway.replicas.discovery import Discovery
from gateway.replicas.options import PoolOptions
from gateway.replicas.replica import Generation, ReplicaClient
from gateway.replicas.routing import choose
from gateway.upstream.connect import Connect
from gateway.upstream.session import UnfitUpstreamError
from llama.model_files import embedding_fits
from llama.v1 import model_pb2
from serving.errors import unavailable

_log = structlog.stdlib.get_logger(__name__)


class MovingGeneration(Generation, Protocol):
    """A generation that needs a replica."""

    fingerprint: str  # only replicas that have it can run the generation
    lost: bool  # its last replica was lost

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""

    def block_digests(self) -> list[bytes]:
        """Digests of its blocks, to find replicas that have its beginning in their caches."""

    def run_at(self, replica: ReplicaClient) -> None:
        """Starts or continues it at a replica."""

    def give_up(self, message: str) -> None:
        """Ends it with UNAVAILABLE, because no replica can continue it."""


class ReplicaPool:
    """The replicas behind a list of targets, each with its own session."""

    def __init__(
        self,
        targets: Sequence[str],
        changed: Callable[[], None],
        options: PoolOptions,
        connect: Connect,
    ) -> None:
        """`changed` is called when `ready_count` may have changed."""
        self.failovers = 0  # how often sequences continued at another replica
        self._options = options
        self._connect = connect
        self._discovery = Discovery(targets)
        self._notify = changed
        self._members: dict[str, tuple[ReplicaClient, asyncio.Task[None]]] = {}
        self._waiting: dict[MovingGeneration, asyncio.TimerHandle] = {}
        self._model: model_pb2.GetModelInfoResponse | None = None  # the latest
        self._tokenizer_fingerprint = ""
        self._vocab_size = 0

    @property
    def replicas(self) -> list[ReplicaClient]:
        """Members by address, with those that left but still run sequences; from any thread."""
        return sorted(self._all, key=lambda replica: replica.target)

    @property
    def _all(self) -> list[ReplicaClient]:
        # A copy, because other threads read this while members change.
        return [replica for replica, _ in [*self._members.values()]]

    @property
    def ready_count(self) -> int:
        return sum(replica.ready for replica in self._all)

    @property
    def model(self) -> model_pb2.GetModelInfoResponse:
        """The model that all ready replicas serve; UNAVAILABLE if there are none."""
        for replica in self._all:
            if replica.ready and replica.info is not None:
                self._model = replica.info
                return replica.info
        raise unavailable("no model replica is available")

    @property
    def latest_model(self) -> model_pb2.GetModelInfoResponse:
        """The model that was ready last; UNAVAILABLE if there was none."""
        return self._model or self.model

    @property
    def batch_capacity(self) -> int:
        """Sequences that the ready replicas run at once."""
        infos = (replica.info for replica in self._all if replica.ready)
        return sum(info.max_batch_size for info in infos if info is not None)

    def place(self, generation: MovingGeneration) -> None:
        """Runs it at a replica as soon as one is ready; gives it up after the failover timeout."""
        if not self._run(generation):
            loop = asyncio.get_running_loop()
            timeout = self._options.failover_timeout
            self._waiting[generation] = loop.call_later(timeout, self._expire, generation)

    def withdraw(self, generation: MovingGeneration) -> None:
        if timer := self._waiting.pop(generation, None):
            timer.cancel()

    async def run(self, tokenizer_fingerprint: str, vocab_size: int) -> None:
        """Keeps a session with each replica that fits this tokenizer, until cancelled."""
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._set_members(await self._discovery.addresses(), tasks)
                if not self._discovery.changes:
                    return
                await asyncio.sleep(self._options.resolve_interval)

    def _set_members(self, addresses: Mapping[str, str | None], tasks: asyncio.TaskGroup) -> None:
        """Adds new replicas; removes those that are gone and run nothing."""
        for target, name in addresses.items():
            if target not in self._members:
                timeout = self._options.hang_timeout
                replica = ReplicaClient(
                    target, self._check, self._changed, timeout, self._connect, name=name
                )
                self._members[target] = replica, tasks.create_task(replica.run())
        for target, (replica, task) in [*self._members.items()]:
            replica.retired = target not in addresses
            if replica.retired and not replica.sequences:
                _log.info("replica is not named any more", upstream=target)
                del self._members[target]
                task.cancel()
        self._changed()

    def _run(self, generation: MovingGeneration) -> bool:
        """Runs it at the best replica; False if none is ready for it."""
        ready = [
            replica
            for replica in self._all
            if replica.ready
            and replica.info is not None
            and replica.info.fingerprint == generation.fingerprint
        ]
        digests = generation.block_digests()
        replica = choose(ready, digests, len(generation.ids))
        if replica is None:
            return False
        replica.prefixes.add(digests)
        self.failovers += generation.lost
        generation.run_at(replica)
        return True

    def _changed(self) -> None:
        self._notify()
        for generation, timer in [*self._waiting.items()]:
            if self._run(generation):
                timer.cancel()
                del self._waiting[generation]

    def _expire(self, generation: MovingGeneration) -> None:
        del self._waiting[generation]
        timeout = self._options.failover_timeout
        generation.give_up(f"no model replica was ready within {timeout:g} seconds")

    def _check(self, info: model_pb2.GetModelInfoResponse) -> None:
        theirs, ours = info.tokenizer_fingerprint, self._tokenizer_fingerprint
        if theirs and ours and theirs != ours:
            raise UnfitUpstreamError(
                f"refused: it was given the tokenizer {theirs[:12]}, the tokenizer service has "
                f"{ours[:12]}; start both with the same tokenizer_path"
            )
        if not embedding_fits(info.vocab_size, self._vocab_size):
            raise UnfitUpstreamError(
                f"refused: its embedding has {info.vocab_size} rows, the tokenizer service has "
                f"{self._vocab_size} tokens; checkpoint and tokenizer do not belong together"
            )
        for other in self._all:
            if other.info is not None and _identity(other.info) != _identity(info):
                raise UnfitUpstreamError(
                    f"refused: it serves {_describe(info)}, but {other.target} serves "
                    f"{_describe(other.info)}; all replicas must serve the same"
                )


def _identity(info: model_pb2.GetModelInfoResponse) -> tuple[str, int]:
    return info.fingerprint, info.context_length


def _describe(info: model_pb2.GetModelInfoResponse) -> str:
    arithmetic = f"{info.dtype} {info.quantization}".strip()
    return (
        f"{info.name} (fingerprint {info.fingerprint}, context length {info.context_length}, "
        f"{arithmetic} on {info.device})"
    )
