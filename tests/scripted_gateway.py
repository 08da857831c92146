"""Gateways whose answers a test writes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from llama.v1 import chat_pb2
from llama.v1.sampling_pb2 import FINISH_REASON_STOP

Behaviour = Callable[[Any, grpc.ServicerContext], Any]

_METHODS = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods_by_name


class StartGateway(Protocol):
    def __call__(self, **methods: Behaviour) -> str: ...


@dataclass(frozen=True)
class Unfinished:
    target: str
    cancelled: threading.Event
    names: list[str]  # of the streams begun
    cancelled_names: list[str]


class Scripted:
    """A gateway that answers each dialog with the next texts, and keeps the contents of dialogs."""

    def __init__(
        self, *answers: Sequence[str], prompt_format: chat_pb2.PromptFormat | None = None
    ) -> None:
        self._started = chat_pb2.Started(prompt_format=prompt_format)
        self.dialogs: list[list[str]] = []
        self._answers = iter(answers)

    def stream(
        self, request: chat_pb2.ChatCompleteStreamRequest, _context: grpc.ServicerContext
    ) -> Iterator[chat_pb2.ChatCompleteStreamResponse]:
        self.dialogs.append([message.content for message in request.dialogs[0].messages])
        yield chat_event(1, started=self._started)
        number = 1
        for number, text in enumerate(next(self._answers), start=2):
            yield chat_event(number, delta=chat_pb2.Delta(text=text))
        finished = chat_pb2.Finished(finish_reason=FINISH_REASON_STOP)
        yield chat_event(number + 1, finished=finished)


def chat_event(number: int, **event: Any) -> chat_pb2.ChatCompleteStreamResponse:
    """The event of this number of a chat stream."""
    numbered = chat_pb2.StreamEvent(event_number=number, **event)
    return chat_pb2.ChatCompleteStreamResponse(event=numbered)


def handler(name: str, behaviour: Behaviour) -> "grpc.RpcMethodHandler[Any, Any]":
    request = getattr(chat_pb2, f"{name}Request")
    response = getattr(chat_pb2, f"{name}Response")
    kind = (
        grpc.unary_stream_rpc_method_handler
        if _METHODS[name].server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return kind(behaviour, request.FromString, response.SerializeToString)
