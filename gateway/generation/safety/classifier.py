"""The client of the safety service: one `Classify` call for each judgement, with a timeout.

If the service does not answer, a request fails (closed) or goes on unjudged (open); the latter is
logged once per outage and counted. No texts of users are logged here.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import grpc
import structlog

from gateway.generation.safety.options import SafetyOptions
from gateway.upstream.connect import Connect, connected
from gateway.upstream.session import (
    FIRST_PAUSE,
    SessionEndedError,
    Upstream,
    answer,
    call_metadata,
    follow_health,
    keep_session,
)
from llama.prompt_format import dialog
from llama.prompt_format.dialog import Message
from llama.v1 import chat_pb2, safety_pb2, safety_pb2_grpc
from llama.v1.operator_pb2 import UPSTREAM_STATE_CONNECTING
from serving.errors import RequestError, resource_exhausted, unavailable

SERVICE = "llama.v1.SafetyService"

_ROLES = {
    dialog.SYSTEM: chat_pb2.ROLE_SYSTEM,
    dialog.USER: chat_pb2.ROLE_USER,
    dialog.ASSISTANT: chat_pb2.ROLE_ASSISTANT,
}

# The text to judge: a dialog, whose last message is judged, or a plain text.
Subject = Sequence[Message] | str
TimeRemaining = Callable[[], float | None]

_UNAVAILABLE = "the safety classifier is not available"

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict of the classifier; `categories` are its own names, empty if it found none."""

    unsafe: bool
    categories: tuple[str, ...] = ()


SAFE = Judgement(unsafe=False)


class SafetyClient:
    """A session with a safety service; `changed` is called when `ready` may have changed."""

    def __init__(
        self, options: SafetyOptions, changed: Callable[[], None], connect: Connect
    ) -> None:
        self.unjudged = 0  # judgements that were skipped in open mode
        self.chunk = options.chunk
        self.upstream = Upstream(options.target, changed)
        self._timeout = options.timeout
        self._open = options.on_failure == "open"
        self._connect = connect
        self._stub: safety_pb2_grpc.SafetyServiceAsyncStub | None = None  # while connected
        self._unjudged_before_outage: int | None = None  # None: no outage

    @property
    def ready(self) -> bool:
        """Whether requests can be answered: judged, or unjudged in open mode."""
        return self.upstream.serving or self._open

    async def run(self) -> NoReturn:
        """Keeps a session; ends when cancelled."""
        _log.info("connecting to safety service", upstream=self.upstream.target)
        await keep_session(self.upstream, self._session)

    async def judge(self, subject: Subject, time_remaining: TimeRemaining) -> Judgement:
        """The classifier's verdict; if it does not answer, UNAVAILABLE (closed) or SAFE (open).

        Closed mode waits for a service that restarts, as long as one judgement may take. Open mode
        does not wait for a service that is known to be unavailable.
        """
        if self._open and not self.upstream.serving:
            return self._without_answer(_UNAVAILABLE, "not connected")
        loop, remaining = asyncio.get_running_loop(), time_remaining()
        expires = remaining is not None and remaining <= self._timeout
        ends = loop.time() + (remaining if remaining is not None and expires else self._timeout)
        request, lost = _request(subject), False
        while True:
            try:
                async with asyncio.timeout_at(ends):
                    await self.upstream.until_serving()
            except TimeoutError:
                return self._failed(grpc.StatusCode.DEADLINE_EXCEEDED, expires=expires)
            found = await self._classify(request, ends - loop.time())
            if isinstance(found, safety_pb2.ClassifyResponse):
                return self._answer(found)
            if found is not grpc.StatusCode.UNAVAILABLE or self._open or lost:
                return self._failed(found, expires=expires)
            lost = True
            await asyncio.sleep(FIRST_PAUSE)

    async def _classify(
        self, request: safety_pb2.ClassifyRequest, seconds: float
    ) -> safety_pb2.ClassifyResponse | grpc.StatusCode:
        """The service's response, or the status of the failed call."""
        if self._stub is None:
            return grpc.StatusCode.UNAVAILABLE
        call = self._stub.Classify(request, timeout=seconds, metadata=call_metadata())
        try:
            return await answer(call)
        except grpc.aio.AioRpcError as error:
            return error.code()
        except SessionEndedError:
            return grpc.StatusCode.UNAVAILABLE

    def _failed(self, code: grpc.StatusCode, *, expires: bool) -> Judgement:
        message = _UNAVAILABLE
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            if expires:  # caused by the caller, so open mode must not skip the judgement
                message = "the deadline passed while the safety classifier was asked"
                raise RequestError(code, message)
            message = f"the safety classifier did not answer within {self._timeout:g} seconds"
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # caused by the caller, too
            message = "dialog and answer are too large for the safety classifier"
            raise resource_exhausted(message, "max_request_bytes", retry_after=None)
        return self._without_answer(message, code.name)

    def _answer(self, response: safety_pb2.ClassifyResponse) -> Judgement:
        if response.verdict not in (safety_pb2.VERDICT_SAFE, safety_pb2.VERDICT_UNSAFE):
            return self._without_answer("the safety classifier gave no verdict", "no verdict")
        self._end_outage()
        if response.verdict == safety_pb2.VERDICT_SAFE:
            return SAFE
        return Judgement(unsafe=True, categories=tuple(response.categories))

    def _without_answer(self, message: str, reason: str) -> Judgement:
        if self._unjudged_before_outage is None:
            self._unjudged_before_outage = self.unjudged
            allowed = "unjudged" if self._open else "refused"
            _log.error(
                "no judgements", upstream=self.upstream.target, reason=reason, requests=allowed
            )
        if not self._open:
            raise unavailable(message)
        self.unjudged += 1
        return SAFE

    def _end_outage(self) -> None:
        if self._unjudged_before_outage is not None:
            missed = self.unjudged - self._unjudged_before_outage
            _log.info("judgements again", upstream=self.upstream.target, missed=missed)
            self._unjudged_before_outage = None

    async def _session(self) -> None:
        async with connected(self._connect, self.upstream.target) as channel:
            self._stub = safety_pb2_grpc.SafetyServiceStub(channel)
            try:
                await follow_health(channel, SERVICE, self.upstream)
            finally:
                # Before the channel closes, so that no new call uses it.
                self._stub = None
                self.upstream.become(UPSTREAM_STATE_CONNECTING, "the session broke")


def _request(subject: Subject) -> safety_pb2.ClassifyRequest:
    if isinstance(subject, str):
        return safety_pb2.ClassifyRequest(text=subject)
    messages = [chat_pb2.Message(role=_ROLES[each.role], content=each.content) for each in subject]
    return safety_pb2.ClassifyRequest(dialog=chat_pb2.Dialog(messages=messages))
