"""SafetyService over gRPC, around any classifier. Its texts are never logged."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from llama.prompt_format.dialog import ASSISTANT, SYSTEM, USER, Message
from llama.v1 import chat_pb2, safety_pb2, safety_pb2_grpc
from serving.errors import Violation, invalid_argument
from serving.server import Health, Service

SERVICE_NAME = safety_pb2.DESCRIPTOR.services_by_name["SafetyService"].full_name

_ROLES = {
    chat_pb2.ROLE_SYSTEM: SYSTEM,
    chat_pb2.ROLE_USER: USER,
    chat_pb2.ROLE_ASSISTANT: ASSISTANT,
}

TimeRemaining = Callable[[], float | None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of a classifier; `categories` are in its own words."""

    unsafe: bool
    categories: tuple[str, ...] = ()


SAFE = Judgement(unsafe=False)


class Classifier(Protocol):
    """Judges the last message of a dialog, or a text as the only message of a user."""

    async def judge(
        self, messages: Sequence[Message], time_remaining: TimeRemaining
    ) -> Judgement: ...


def safety_service(
    classifier: Classifier, run: Callable[[Health], Awaitable[None]] | None = None
) -> Service:
    """The service as `serving` runs it; `run` updates its health if that depends on others."""

    def register(server: grpc.aio.Server) -> None:
        servicer = SafetyServicer(classifier)
        safety_pb2_grpc.add_SafetyServiceServicer_to_server(servicer, server)

    return Service(names=[SERVICE_NAME], register=register, run=run)


class SafetyServicer(safety_pb2_grpc.SafetyServiceServicer):
    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    async def Classify(
        self,
        request: safety_pb2.ClassifyRequest,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> safety_pb2.ClassifyResponse:
        messages = _messages(request)
        judgement = await self._classifier.judge(messages, context.time_remaining)
        return safety_pb2.ClassifyResponse(
            verdict=safety_pb2.VERDICT_UNSAFE if judgement.unsafe else safety_pb2.VERDICT_SAFE,
            categories=judgement.categories,
        )


def _messages(request: safety_pb2.ClassifyRequest) -> list[Message]:
    """The messages of a request; INVALID_ARGUMENT."""
    if request.HasField("text"):
        return [Message(USER, request.text)]
    if not request.HasField("dialog"):
        raise invalid_argument([Violation("content", "must be a dialog or a text")])
    given = request.dialog.messages
    if not given:
        raise invalid_argument([Violation("dialog.messages", "must not be empty")])
    violations = [
        Violation(f"dialog.messages[{index}].role", "must be system, user or assistant")
        for index, each in enumerate(given)
        if each.role not in _ROLES
    ]
    if violations:
        raise invalid_argument(violations)
    return [Message(_ROLES[each.role], each.content) for each in given]
