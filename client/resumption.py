"""Continues a stream after its connection broke: decides which call comes next, which events are
new, and when to give up. Makes no calls, so that both clients share it and tests need no network.

While the gateway knows the stream, it is resumed after the last event that arrived. A restarted
gateway does not know it. Then the same request is sent again with the reported seed, which gives
the same tokens as far as `Determinism` says; the delivered part is compared and skipped.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc

from client import arguments, results
from client.errors import (
    ChasquiError,
    DeadlineExceededError,
    ResourceExhaustedError,
    StreamLostError,
    UnavailableError,
    UnreachableError,
)
from client.results import Delta, Event, Finished, Started
from llama.v1 import chat_pb2

# Seconds. By default a gateway keeps a stream without a reader just as long.
RESUME_SECONDS = 30.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0

_log = logging.getLogger("chasqui")

StreamRequest = chat_pb2.ChatCompleteStreamRequest | chat_pb2.TextCompleteStreamRequest
NextRequest = StreamRequest | chat_pb2.ResumeStreamRequest
StreamResponse = (
    chat_pb2.ChatCompleteStreamResponse
    | chat_pb2.TextCompleteStreamResponse
    | chat_pb2.ResumeStreamResponse
)


def resume_limit(resume_seconds: float) -> float:
    """The checked `resume_seconds` of a client. ValueError: it is not a number of seconds."""
    try:
        limit = arguments.seconds(resume_seconds)
    except ValueError as error:
        raise ValueError(f"resume_seconds {error}") from None
    return math.inf if limit is None else limit


class ResumableStream:
    """One stream of a client, across all calls that it needs.

    After a failed call, `pause_after` returns how long to wait before the next one. With
    `resume_seconds` 0 the stream has no name and no further call. `clock` returns seconds.
    """

    def __init__(
        self,
        request: StreamRequest,
        timeout: float | None,
        resume_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ended = False
        self._request = request
        self._resume_seconds = resume_seconds
        self._clock = clock
        self._timeout = timeout
        self._deadline: float | None = None
        self._answers = _Answers()
        self._called = False
        self._known = False  # the gateway probably knows the stream
        self._repeating = False
        self._last = 0  # the number of the last event that arrived
        self._lost_at: float | None = None
        self._pause = FIRST_PAUSE
        if resume_seconds:
            self._rename()

    @property
    def name(self) -> str:
        """Its name at the gateway, a new one for each repetition; empty: it has none."""
        return self._request.stream_name

    @property
    def wants_cancel(self) -> bool:
        """Whether the gateway may still work on it after the reader has left."""
        return bool(self.name) and self._called and not self.ended

    def next_request(self) -> NextRequest:
        """The request of the next call; the first use starts the stream's timeout."""
        if not self._called and self._timeout is not None:
            self._deadline = self._clock() + self._timeout
        self._called = True
        if not self._known:
            return self._request
        return chat_pb2.ResumeStreamRequest(stream_name=self.name, after_event_number=self._last)

    def time_left(self) -> float | None:
        """Seconds that the next call may take; None: no limit."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def on_response(self, response: StreamResponse) -> Event | None:
        """The event of a response, without what was delivered before; None: nothing is new."""
        number = response.event.event_number
        if number != self._last + 1:
            raise self._lost(f"event {number} came after event {self._last}")
        self._last = number
        self._known = True
        self._lost_at, self._pause = None, FIRST_PAUSE
        try:
            return self._answers.new_part(results.event(response.event))
        except _DifferentAnswerError as difference:
            raise self._lost(str(difference)) from None

    def end(self) -> None:
        """Marks the stream as complete."""
        self.ended = True

    def pause_after(self, error: ChasquiError) -> float:
        """Seconds to wait before the next call; raises the final error if there is none."""
        if not self.name:
            self.ended = True
        if self.ended or isinstance(error, DeadlineExceededError):
            raise error
        pause = 0.0
        match error:
            case UnreachableError() if self._known or self._repeating or error.request_id:
                self._known = self._known or error.request_id is not None
                pause = self._next_pause()
            case UnavailableError() | ResourceExhaustedError() if self._waits_to_repeat:
                pause = max(error.retry_after or 0.0, self._next_pause())
            case ChasquiError(code=grpc.StatusCode.NOT_FOUND) if self._known:
                self._repeat()
            case ChasquiError(code=grpc.StatusCode.ALREADY_EXISTS) if self._repeating:
                self._known = True  # the call that seemed to fail had started it
            case ChasquiError(code=grpc.StatusCode.OUT_OF_RANGE):
                raise self._lost(error.message) from error
            case _:
                self.ended = True
                raise error
        self._check_time(pause, error)
        return pause

    @property
    def _waits_to_repeat(self) -> bool:
        return self._repeating and not self._known

    def _next_pause(self) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause

    def _check_time(self, pause: float, error: ChasquiError) -> None:
        now = self._clock()
        if self._deadline is not None and now + pause >= self._deadline:
            raise DeadlineExceededError("the call did not end within its timeout") from error
        if self._lost_at is None:
            self._lost_at = now
            _log.warning("%s; %s", error.message, self._attempts())
        if now + pause > self._lost_at + self._resume_seconds:
            reason = f"it could not be resumed within {self._resume_seconds:g} seconds"
            raise self._lost(f"{reason} ({error.message})") from error

    def _attempts(self) -> str:
        """The attempts to continue after the connection broke, in words."""
        limit = min(self._resume_seconds, math.inf if (left := self.time_left()) is None else left)
        until = "" if math.isinf(limit) else f" for up to {limit:.3g} seconds"
        return f"trying{until} to continue the answer"

    def _repeat(self) -> None:
        """Makes the next call repeat the request from the beginning."""
        sampling = self._request.sampling
        if self._last and not sampling.HasField("seed"):
            greedy = sampling.HasField("temperature") and sampling.temperature == 0
            seed = self._answers.seed(self._prompts, greedy=greedy)
            if seed is None:
                raise self._lost(
                    "the gateway has forgotten it, and answers to several dialogs or prompts can "
                    "only be repeated if the request has a seed"
                )
            sampling.seed = seed
        self._rename()
        self._answers.rewind()
        self._known, self._repeating, self._last = False, True, 0

    @property
    def _prompts(self) -> int:
        if isinstance(self._request, chat_pb2.ChatCompleteStreamRequest):
            return len(self._request.dialogs)
        return len(self._request.prompts) + len(self._request.prompt_ids)

    def _rename(self) -> None:
        self._request.stream_name = str(uuid.uuid4())

    def _lost(self, reason: str) -> StreamLostError:
        return StreamLostError(reason, self._answers.delivered_events)


class _DifferentAnswerError(Exception):
    """The repeated answer differs from the one that had been delivered."""


@dataclass(slots=True)
class _Answer:
    """The delivered part of one answer, and how far the current repetition has come."""

    started: Started
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finished: bool = False
    old_text: str = ""  # delivered before this repetition
    old_ids: int = 0
    seen_text: int = 0
    seen_ids: int = 0


class _Answers:
    """All answers of a stream; passes on only the parts that were not delivered yet."""

    def __init__(self) -> None:
        self.delivered_events = 0
        self._answers: dict[tuple[int, int], _Answer] = {}

    def new_part(self, event: Event) -> Event | None:
        """The new part of an event; raises if the rest differs from the delivered part."""
        answer = self._answers.get((event.index, event.choice_index))
        new: Event | None
        match event:
            case Started():
                new = self._begin(event, answer)
            case Delta() if answer is not None:
                new = _new_part(event, answer)
            case Finished() if answer is not None:
                if answer.seen_text < len(answer.old_text) or answer.seen_ids < answer.old_ids:
                    raise _DifferentAnswerError("an answer came out shorter when it was repeated")
                new = None if answer.finished else event
                answer.finished = True
            case _:
                raise _DifferentAnswerError("an answer arrived without its Started event")
        self.delivered_events += new is not None
        return new

    def rewind(self) -> None:
        """Prepares for a repetition of all answers from their beginning."""
        for answer in self._answers.values():
            answer.old_text, answer.old_ids = "".join(answer.text), len(answer.ids)
            answer.seen_text = answer.seen_ids = 0

    def seed(self, prompts: int, *, greedy: bool) -> int | None:
        """The request's seed that repeats all answers to `prompts` prompts; None: there is none."""
        for (_, choice), answer in self._answers.items():
            if prompts == 1 or greedy:
                return (answer.started.seed - choice) % 2**64
        return None

    def _begin(self, started: Started, answer: _Answer | None) -> Event | None:
        if answer is None:
            self._answers[started.index, started.choice_index] = _Answer(started)
            return started
        if started.fingerprint != answer.started.fingerprint:
            raise _DifferentAnswerError(
                f"the gateway serves another model now: fingerprint {started.fingerprint}, and it "
                f"was {answer.started.fingerprint}"
            )
        return None


def _new_part(delta: Delta, answer: _Answer) -> Delta | None:
    old_text = answer.old_text[answer.seen_text : answer.seen_text + len(delta.text)]
    old_ids = answer.ids[answer.seen_ids : min(answer.seen_ids + len(delta.tokens), answer.old_ids)]
    if not delta.text.startswith(old_text) or old_ids != [
        token.id for token in delta.tokens[: len(old_ids)]
    ]:
        raise _DifferentAnswerError("an answer came out differently when it was repeated")
    answer.seen_text += len(delta.text)
    answer.seen_ids += len(delta.tokens)
    text, tokens = delta.text[len(old_text) :], delta.tokens[len(old_ids) :]
    answer.text.append(text)
    answer.ids += [token.id for token in tokens]
    return replace(delta, text=text, tokens=tokens) if text or tokens else None
