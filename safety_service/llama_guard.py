"""The classifier Llama Guard (Inan et al., 2023): a language model that another gateway serves.

It answers "safe", or "unsafe" and a line of categories. The service comes with the categories of
the model card in our own words. An operator can name a file with the card's original text, on which
the model was trained.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from llama.prompt_format.dialog import SYSTEM, Message
from llama.prompt_format.llama_guard import default_policy, render
from llama.v1 import chat_pb2, chat_pb2_grpc
from llama.v1.sampling_pb2 import SamplingParams
from safety_service.server import Judgement, TimeRemaining
from serving.errors import StartError, unavailable
from serving.server import Health, channel
from serving.telemetry import request_id

# Enough for "unsafe", a line break and all categories of the policy that comes with the service.
_MAX_ANSWER_TOKENS = 32
_SECONDS_BETWEEN_SESSIONS = 1.0

_log = structlog.stdlib.get_logger(__name__)


def read_policy(path: Path | None = None) -> str:
    """The categories for the prompt, by default in our words; StartError."""
    if path is None:
        return default_policy()
    try:
        policy = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the policy {path}: {error}") from error
    if not policy:
        raise StartError(f"the policy {path} is empty")
    return policy


def parse(answer: str) -> Judgement | None:
    """The judgement in an answer; None if it is not one."""
    verdict, _, rest = answer.strip().partition("\n")
    match verdict.strip().lower():
        case "safe":
            return Judgement(unsafe=False)
        case "unsafe":
            named = rest.strip().partition("\n")[0].split(",")
            return Judgement(True, tuple(each.strip() for each in named if each.strip()))
    return None


class LlamaGuard:
    """Asks the gateway at `target`. Create it in the event loop that uses it."""

    def __init__(self, target: str, policy: str) -> None:
        self._target = target
        self._policy = policy
        self._channel = channel(target)
        self._stub = chat_pb2_grpc.ChatServiceStub(self._channel)

    async def run(self, health: Health) -> NoReturn:
        """Copies the gateway's health to this service's; runs until cancelled."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        request = HealthCheckRequest(service="llama.v1.ChatService")
        logged: grpc.StatusCode | None = None
        try:
            while True:
                call = stub.Watch(request, wait_for_ready=True)  # type: ignore[attr-defined]  # not in the stubs
                try:
                    async for response in call:
                        logged = None
                        await health.set_serving(response.status == HealthCheckResponse.SERVING)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not logged:
                        _log.error("guard lost", upstream=self._target, reason=error.code().name)
                    logged = error.code()
                finally:
                    call.cancel()
                await health.set_serving(False)
                await asyncio.sleep(_SECONDS_BETWEEN_SESSIONS)
        finally:
            await self._channel.close()

    async def judge(self, messages: Sequence[Message], time_remaining: TimeRemaining) -> Judgement:
        """Judges the last message, after as much of the dialog before it as fits; UNAVAILABLE.

        System messages are left out, because Llama Guard knows none.
        """
        turns = [each for each in messages if each.role != SYSTEM] or messages[-1:]
        while True:
            try:
                return await self._ask(turns, time_remaining)
            except grpc.aio.AioRpcError as error:
                # Only the length of the prompt can be invalid.
                too_long = error.code() is grpc.StatusCode.INVALID_ARGUMENT
                if not too_long or len(turns) <= 2:
                    reason = error.code().name
                    raise unavailable(f"the guard model gave no answer: {reason}") from error
            turns = turns[2 * max(1, len(turns) // 4) :]

    async def _ask(self, messages: Sequence[Message], time_remaining: TimeRemaining) -> Judgement:
        request = chat_pb2.TextCompleteRequest(
            prompts=[render(self._policy, messages)],
            sampling=SamplingParams(temperature=0, max_gen_len=_MAX_ANSWER_TOKENS),
        )
        current = request_id.current()
        metadata = () if current is None else ((request_id.METADATA_KEY, current),)
        call = self._stub.TextComplete(request, timeout=time_remaining(), metadata=metadata)
        try:
            response = await call
        finally:
            call.cancel()
        judgement = parse(response.predictions[0].text)
        if judgement is None:
            raise unavailable("the guard model's answer is neither safe nor unsafe")
        return judgement
