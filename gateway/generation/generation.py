"""One generation's work at the replicas: begun when its turn comes, accounted as it is served, over
with its last event. A place is free only when the replica is done with it, however long before its
client went away.
"""

import asyncio
from collections.abc import Callable

from gateway.admission.admission import Turn
from gateway.generation.answer import Answer
from gateway.replicas.pool import ReplicaPool, ResumableSequence
from llama.v1 import model_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_CANCELLED

# What comes of a generation: an event, or why there will be none.
Outcome = model_pb2.TokenEvent | Exception


class Generation:
    """Waits for its turn, then runs; its outcomes end with a last event or an exception."""

    def __init__(
        self,
        answer: Answer,
        start: model_pb2.StartSequence,
        turn: Turn,
        replicas: ReplicaPool,
        deliver: Callable[[Outcome], None],
    ) -> None:
        self.answer = answer
        self._start = start
        self._turn = turn
        self._replicas = replicas
        self._deliver = deliver
        self._sequence: ResumableSequence | None = None
        self._unreported_prompt_tokens = len(start.prompt_ids) if start.prompt_logprobs else 0
        self._computed = False
        self._ended = False
        turn.has_come.add_done_callback(self._begin)

    @property
    def prompt_tokens(self) -> int:
        return len(self._start.prompt_ids)

    @property
    def max_gen_len(self) -> int:
        """The most tokens its answer may have, at most what the context leaves."""
        return self._start.sampling.max_gen_len

    @property
    def waited(self) -> float:
        """Seconds until its turn came."""
        return self._turn.waited

    @property
    def resumed(self) -> int:
        """How often it went on at another replica."""
        return 0 if self._sequence is None else self._sequence.resumed

    def cancel(self) -> None:
        """Asks for an early end; the last event still comes. Harmless after the end."""
        if self._sequence is not None:
            self._sequence.cancel()
        elif not self._ended:
            if self._turn.granted:
                self._end(cached_prompt_tokens=0)
            else:
                self._ended = True
                self._turn.leave()
            self._deliver(model_pb2.TokenEvent(finish_reason=FINISH_REASON_CANCELLED))

    def _begin(self, has_come: asyncio.Future[None]) -> None:
        displaced = None if has_come.cancelled() else has_come.exception()
        if has_come.cancelled() or self._ended:
            return
        if isinstance(displaced, Exception):
            self._ended = True
            self._deliver(displaced)
            return
        try:
            self._sequence = self._replicas.start(self._start, self._take)
        except Exception as error:  # whoever waits for the outcome has to hear of it
            self._end(cached_prompt_tokens=0)
            self._deliver(error)

    def _take(self, event: model_pb2.TokenEvent) -> None:
        if event.ids:
            # Reported prompt tokens come with the first of the answer's, and were charged before.
            self._computed = True
            self._turn.served(len(event.ids) - self._unreported_prompt_tokens)
            self._unreported_prompt_tokens = 0
        if event.finish_reason or event.HasField("error"):
            self._computed |= event.timings.compute.ToNanoseconds() > 0
            self._end(event.cached_prompt_tokens)
        self._deliver(event)

    def _end(self, cached_prompt_tokens: int) -> None:
        if self._ended:
            return
        self._ended = True
        unused = cached_prompt_tokens if self._computed else self.prompt_tokens
        self._turn.end(unused)
