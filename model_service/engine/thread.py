"""The thread that owns the model and all engine state.

Commands come in through one queue, and outputs leave through one callback. Beside these, only the
load report is shared, an immutable value that the thread replaces after each iteration, and the
step times, which are thread-safe.
"""

import gc
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from model_service.engine import PROBE_INTERVAL
from model_service.engine.engine import Engine
from model_service.engine.limits import EngineLimits, EngineLoad
from model_service.engine.sequence import FinishReason, GenerationRequest, SequenceOutput


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: Hashable


class _Stop:
    """Ends the thread."""


Deliver = Callable[[list[SequenceOutput]], None]


class EngineThread:
    """Runs an engine's steps; `start` and `cancel` may be called from any thread."""

    def __init__(
        self, engine: Engine, deliver: Deliver, failed: Callable[[Exception], None]
    ) -> None:
        """Becomes the owner of `engine`: from now on only this thread touches it.

        Args:
            engine: runs the steps.
            deliver: called in this thread with the outputs of a step.
            failed: called at the end of this thread, if a step raised.
        """
        self.limits: EngineLimits = engine.limits
        self.load: EngineLoad = engine.load()
        self.step_times = engine.step_times
        self.last_step_at = time.monotonic()
        self.answered = False  # whether a token has gone through all shards yet
        self._engine = engine
        self._deliver = deliver
        self._failed = failed
        self._commands: queue.SimpleQueue[GenerationRequest | _Cancel | _Stop] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def run(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def start(self, request: GenerationRequest) -> None:
        self._commands.put(request)

    def cancel(self, request_id: Hashable) -> None:
        self._commands.put(_Cancel(request_id))

    def stop(self) -> None:
        """Ends the thread after the running step, and waits for it."""
        self._commands.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.probe()
            self.answered = True
            # All that was loaded stays, so that no collection has to walk it while streams wait.
            gc.freeze()
            while not self._stopping:
                self._iterate()
        except Exception as error:  # any error of a step ends this replica
            self._failed(error)

    def _iterate(self) -> None:
        """Applies all commands in the queue, then runs a step; waits only if there is no work."""
        outputs = self._apply_commands(wait=not self._engine.has_work)
        if self._stopping:
            return
        if self._engine.has_work:
            outputs += self._engine.step()
        else:
            self._engine.probe()
        self.last_step_at = time.monotonic()
        self.load = self._engine.load()
        if outputs:
            self._deliver(outputs)

    def _apply_commands(self, *, wait: bool) -> list[SequenceOutput]:
        """Applies commands; returns an output for each request that the engine refuses."""
        refused = []
        try:
            while True:
                command = self._commands.get(block=wait, timeout=PROBE_INTERVAL)
                wait = False
                match command:
                    case GenerationRequest():
                        try:
                            self._engine.add(command)
                        except ValueError as error:
                            refused.append(
                                SequenceOutput(
                                    command.request_id,
                                    finish_reason=FinishReason.REFUSED,
                                    error=str(error),
                                )
                            )
                    case _Cancel():
                        self._engine.cancel(command.request_id)
                    case _Stop():
                        self._stopping = True
        except queue.Empty:
            return refused
