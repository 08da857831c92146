"""The asyncio client. `client/sync.py` is the same without asyncio: change both together.

A stream is a generator that owns its call. Python closes one that a loop has left a little later,
when the event loop gets to it; `contextlib.aclosing` cancels the call there and then.
"""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self, TypeVar, Unpack

import grpc

from client import requests, results, status
from client.channel import DEFAULT_TARGET, channel_options
from client.errors import from_rpc_error
from client.requests import CallOptions, ChatOptions, Dialog, Prompt, RenderOptions, TextOptions
from client.results import ChatPrediction, Event, Model, RenderedPrompt, TextPrediction
from llama.v1 import chat_pb2
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.operator_pb2_grpc import OperatorServiceStub

Request = TypeVar("Request")
Response = TypeVar("Response")
Stream = AsyncGenerator[Event, None]


class AsyncClient:
    """Talks to a gateway, in the event loop it is made in. Use it in `async with`, or close it.

    A method whose call fails raises a ChasquiError. Options are keyword arguments, spelled out in
    `client.requests`.
    """

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, channel_options(target))
        self._stub = ChatServiceStub(self._channel)
        self._operator = OperatorServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection and cancels the calls that still run on it."""
        await self._channel.close()

    async def chat(self, dialog: Dialog, **options: Unpack[ChatOptions]) -> ChatPrediction:
        """Answers one dialog."""
        return (await self.chat_choices(dialog, 1, **options))[0]

    async def chat_choices(
        self, dialog: Dialog, n: int, **options: Unpack[ChatOptions]
    ) -> list[ChatPrediction]:
        """`n` answers to one dialog, in the order of `choice_index`."""
        return await self.chat_many([dialog], n=n, **options)

    async def chat_many(
        self, dialogs: Sequence[Dialog], *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> list[ChatPrediction]:
        """Answers several dialogs in one call, in their order; `n` answers in a row to each."""
        request = requests.chat(chat_pb2.ChatCompleteRequest, dialogs, options, n)
        with self._readable_errors():
            response = await self._stub.ChatComplete(request, timeout=options.get("timeout"))
        return [results.chat_prediction(each) for each in response.predictions]

    def chat_stream(
        self, dialog: Dialog, *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """Answers one dialog while it is made: Started, then Delta by Delta, then Finished."""
        return self.chat_stream_many([dialog], n=n, **options)

    def chat_stream_many(
        self, dialogs: Sequence[Dialog], *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """Answers several dialogs in one call; their events are interleaved.

        `index` tells the dialog of each, `choice_index` which of its `n` answers.
        """
        request = requests.chat(chat_pb2.ChatCompleteStreamRequest, dialogs, options, n)
        call = partial(self._stub.ChatCompleteStream, request, timeout=options.get("timeout"))
        return self._stream(call, results.chat_event)

    async def complete(self, prompt: Prompt, **options: Unpack[TextOptions]) -> TextPrediction:
        """Continues one text, or one sequence of token ids."""
        return (await self.complete_choices(prompt, 1, **options))[0]

    async def complete_choices(
        self, prompt: Prompt, n: int, **options: Unpack[TextOptions]
    ) -> list[TextPrediction]:
        """`n` continuations of one prompt, in the order of `choice_index`."""
        return await self.complete_many([prompt], n=n, **options)

    async def complete_many(
        self, prompts: Sequence[Prompt], *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> list[TextPrediction]:
        """Continues several prompts, all texts or all token ids, like `chat_many`."""
        request = requests.text(chat_pb2.TextCompleteRequest, prompts, options, n)
        with self._readable_errors():
            response = await self._stub.TextComplete(request, timeout=options.get("timeout"))
        return [results.text_prediction(each) for each in response.predictions]

    def complete_stream(
        self, prompt: Prompt, *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> Stream:
        """Continues one prompt while it is made: Started, then Delta by Delta, then Finished."""
        return self.complete_stream_many([prompt], n=n, **options)

    def complete_stream_many(
        self, prompts: Sequence[Prompt], *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> Stream:
        """Continues several prompts in one call; events are as those of `chat_stream_many`."""
        request = requests.text(chat_pb2.TextCompleteStreamRequest, prompts, options, n)
        call = partial(self._stub.TextCompleteStream, request, timeout=options.get("timeout"))
        return self._stream(call, results.text_event)

    async def render_prompt(
        self, dialog: Dialog, **options: Unpack[RenderOptions]
    ) -> RenderedPrompt:
        """The token ids and text that a dialog becomes; spends no model time."""
        request = requests.render_prompt(dialog, options)
        with self._readable_errors():
            response = await self._stub.RenderPrompt(request, timeout=options.get("timeout"))
        return results.rendered_prompt(response)

    async def get_status(self, **options: Unpack[CallOptions]) -> status.GatewayStatus:
        """What the gateway sees: its replicas, their load, and what runs and waits."""
        request = requests.get_status(options)
        with self._readable_errors():
            response = await self._operator.GetStatus(request, timeout=options.get("timeout"))
        return status.gateway_status(response)

    async def get_model(self, **options: Unpack[CallOptions]) -> Model:
        """What is served: model, limits, defaults."""
        request = requests.get_model(options)
        with self._readable_errors():
            response = await self._stub.GetModel(request, timeout=options.get("timeout"))
        return results.model(response)

    async def _stream(
        self,
        start: Callable[[], grpc.aio.UnaryStreamCall[Request, Response]],
        event: Callable[[Response], Event],
    ) -> Stream:
        # The call begins here and not sooner: a generator that is never entered has no `finally`.
        with self._readable_errors():
            call = start()
            try:
                async for response in call:
                    yield event(response)
            finally:
                call.cancel()

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
