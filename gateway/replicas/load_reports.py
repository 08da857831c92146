"""The load of one replica, as its model service reports it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import grpc

from gateway.upstream.session import UpstreamError
from llama.v1 import model_pb2, model_pb2_grpc

LOAD_INTERVAL = 1.0  # seconds from one load report to the next
FRESH_LOAD_SECONDS = 0.5  # the longest wait for a fresh load report
OVERDUE = 3.0  # age in seconds of a load report from which on the replica may hang
# Hang timeouts without a step after which a replica counts as lost. More than one, because the step
# of a long prompt can be slow, while GetLoad is answered at once.
STEP_TIMEOUTS = 3


class LoadReports:
    """Keeps the latest report of a session; `changed` is called with each new one."""

    def __init__(
        self, hang_timeout: float, changed: Callable[[model_pb2.GetLoadResponse], None]
    ) -> None:
        """`hang_timeout` is how long the replica may take to answer, in seconds."""
        self.latest: model_pb2.GetLoadResponse | None = None
        self._hang_timeout = hang_timeout
        self._changed = changed
        self._recorded_at = 0.0
        self._wanted = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def age(self) -> float | None:
        """Seconds since the latest report; None while there is none."""
        return None if self.latest is None else time.monotonic() - self._recorded_at

    @property
    def overdue(self) -> bool:
        """Whether the latest report is so old that the replica may hang."""
        age = self.age
        return age is not None and age > OVERDUE

    def record(self, load: model_pb2.GetLoadResponse) -> None:
        """Stores a new report."""
        self.latest, self._recorded_at = load, time.monotonic()
        self._changed(load)

    async def refresh(self) -> None:
        """Waits for a new report, but not longer than FRESH_LOAD_SECONDS."""
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(recorded)
        self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(FRESH_LOAD_SECONDS):
                await recorded

    async def follow(
        self,
        stub: "model_pb2_grpc.ModelServiceAsyncStub",
        last_event_at: Callable[[], float | None],
    ) -> NoReturn:
        """Keeps the latest report up to date; raises UpstreamError if the replica hangs.

        `last_event_at` returns when the replica sent its last event (time.monotonic); None while it
        runs no sequence.
        """
        stepped_at, timeout = time.monotonic(), self._hang_timeout
        while True:
            request = model_pb2.GetLoadRequest()
            self._wanted.clear()
            waiting, self._waiting = self._waiting, []
            try:
                load = await stub.GetLoad(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                raise UpstreamError(f"it hangs: no answer within {timeout:g} seconds") from error
            now, event_at = time.monotonic(), last_event_at()
            if self.latest is None or load.steps != self.latest.steps or event_at is None:
                stepped_at = now
            self.record(load)
            for recorded in waiting:
                if not recorded.done():
                    recorded.set_result(None)
            if now - max(stepped_at, event_at or 0) > STEP_TIMEOUTS * timeout:
                raise UpstreamError(f"it hangs: no step within {STEP_TIMEOUTS * timeout:g} seconds")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOAD_INTERVAL):
                    await self._wanted.wait()
