"""Many streams of one gateway at once, and the part of each that its client received."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from llama.v1.chat_pb2 import Finished, Started, TextCompleteStreamRequest, Token
from llama.v1.chat_pb2_grpc import ChatServiceStub


@dataclass
class Answer:
    """The part of one answer that a client received; the request asked for logprobs."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    started: Started = field(default_factory=Started)
    finished: Finished = field(default_factory=Finished)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]


class Streams:
    """A stream for each request, all of them at once."""

    def __init__(self, address: str, requests: Sequence[TextCompleteStreamRequest]) -> None:
        """Prepares requests of one prompt each for the gateway there."""
        self.answers = [Answer() for each in requests for _ in range(_choices(each))]
        self._address = address
        self._requests = requests
        self._grown = asyncio.Condition()

    async def run(self) -> None:
        """All of them to their ends."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = ChatServiceStub(channel)
            begin = 0
            async with asyncio.TaskGroup() as tasks:
                for request in self._requests:
                    end = begin + _choices(request)
                    tasks.create_task(self._follow(request, self.answers[begin:end], stub))
                    begin = end

    async def all_have(self, tokens: int) -> None:
        """Waits until every answer has so many."""
        async with self._grown:
            await self._grown.wait_for(lambda: min(len(a.tokens) for a in self.answers) >= tokens)

    async def _follow(
        self, request: TextCompleteStreamRequest, choices: list[Answer], stub: Any
    ) -> None:
        async for response in stub.TextCompleteStream(request):
            match response.event.WhichOneof("kind"):
                case "started":
                    started = response.event.started
                    choices[started.choice_index].started = started
                case "delta":
                    delta = response.event.delta
                    choices[delta.choice_index].tokens += delta.tokens
                    choices[delta.choice_index].text += delta.text
                    async with self._grown:
                        self._grown.notify_all()
                case "finished":
                    finished = response.event.finished
                    choices[finished.choice_index].finished = finished


def _choices(request: TextCompleteStreamRequest) -> int:
    return request.n if request.HasField("n") else 1


def resumed(answers: Sequence[Answer]) -> int:
    """How often the answers continued on another replica."""
    return sum(answer.finished.failovers for answer in answers)
