# Generated from client/aio.py by `make sync-client`. Do not edit.
"""The synchronous client.

A stream is a generator that owns its call, and further calls after the connection was lost. Leaving
its loop closes the generator, which cancels the stream, and the servers free what it held within
one step of the engine.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self, Unpack

import grpc

from client import requests, results, scores, status
from client.connection.cancel import cancel_streams
from client.connection.channel import DEFAULT_TARGET, Tls, open_channel, with_key
from client.connection.diagnosis import explained
from client.errors import ChasquiError, UnreachableError, from_rpc_error
from client.requests import (
    CallOptions,
    ChatOptions,
    DetokenizeOptions,
    Dialog,
    Prompt,
    RenderOptions,
    ScoreOptions,
    TextOptions,
    TokenizeOptions,
)
from client.results import Event, Model, Prediction, RenderedPrompt
from client.resumption import (
    RESUME_SECONDS,
    ResumableStream,
    StreamRequest,
    StreamResponse,
    resume_limit,
)
from client.scores import DetokenizedText, Score, Tokenization
from llama.v1 import chat_pb2
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.operator_pb2_grpc import OperatorServiceStub

Stream = Generator[Event, None]


class Call(Protocol):
    """A running call that streams its responses."""

    def __iter__(self) -> Iterator[StreamResponse]: ...
    def cancel(self) -> object: ...


class Client:
    """A client of a gateway, which threads may share. Use it in `with`.

    Options of the methods are keyword arguments: the TypedDicts of `client.requests` list them. A
    method whose call fails raises a ChasquiError.

    Args:
        target: the gateway's address, host:port or one of gRPC's own forms.
        tls: TLS settings. None: plaintext, so that the API key can be read on the network.
        api_key: the API key, for gateways that require one.
        resume_seconds: how long a stream tries to continue after its connection broke, which the
            logger "chasqui" reports as a warning. 0: the stream fails at once.

    Raises:
        ValueError: an argument is invalid. OSError: a file of `tls` cannot be read.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        resume_seconds: float = RESUME_SECONDS,
    ) -> None:
        self.target = target
        self._tls = tls
        self._resume_seconds = resume_limit(resume_seconds)
        self._streams: set[ResumableStream] = set()  # being read
        self._channel = open_channel(target, tls)
        channel = with_key(self._channel, api_key)
        self._stub = ChatServiceStub(channel)
        self._operator = OperatorServiceStub(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and cancels the calls that still run on it."""
        self._cancel([*self._streams])
        self._channel.close()

    def chat(self, dialog: Dialog, **options: Unpack[ChatOptions]) -> Prediction:
        """Answers one dialog."""
        [prediction] = self.chat_choices(dialog, 1, **options)
        return prediction

    def chat_choices(
        self, dialog: Dialog, n: int, **options: Unpack[ChatOptions]
    ) -> list[Prediction]:
        """`n` answers to one dialog, in the order of `choice_index`."""
        return self.chat_many([dialog], n=n, **options)

    def chat_many(
        self, dialogs: Sequence[Dialog], *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> list[Prediction]:
        """Answers several dialogs in one call, in their order; `n` answers in a row to each."""
        request = requests.chat(chat_pb2.ChatCompleteRequest, dialogs, options, n)
        with self._readable_errors():
            response = self._stub.ChatComplete(request, timeout=requests.deadline(options))
        return results.predictions(response)

    def chat_stream(
        self, dialog: Dialog, *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """Streams the answer to one dialog: Started, then any number of Delta, then Finished."""
        return self.chat_stream_many([dialog], n=n, **options)

    def chat_stream_many(
        self, dialogs: Sequence[Dialog], *, n: int | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """Streams the answers to several dialogs in one call; their events are interleaved.

        `index` is the dialog's position, `choice_index` tells which of its `n` answers it is.
        """
        request = requests.chat(chat_pb2.ChatCompleteStreamRequest, dialogs, options, n)
        return self._stream(self._resumable(request, options))

    def complete(self, prompt: Prompt, **options: Unpack[TextOptions]) -> Prediction:
        """Continues one text, or one sequence of token ids."""
        [prediction] = self.complete_choices(prompt, 1, **options)
        return prediction

    def complete_choices(
        self, prompt: Prompt, n: int, **options: Unpack[TextOptions]
    ) -> list[Prediction]:
        """`n` continuations of one prompt, in the order of `choice_index`."""
        return self.complete_many([prompt], n=n, **options)

    def complete_many(
        self, prompts: Sequence[Prompt], *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> list[Prediction]:
        """Continues several prompts, all texts or all token ids, like `chat_many`."""
        request = requests.text(chat_pb2.TextCompleteRequest, prompts, options, n)
        with self._readable_errors():
            response = self._stub.TextComplete(request, timeout=requests.deadline(options))
        return results.predictions(response)

    def complete_stream(
        self, prompt: Prompt, *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> Stream:
        """Streams the continuation of one prompt, with events as of `chat_stream`."""
        return self.complete_stream_many([prompt], n=n, **options)

    def complete_stream_many(
        self, prompts: Sequence[Prompt], *, n: int | None = None, **options: Unpack[TextOptions]
    ) -> Stream:
        """Streams the continuations of several prompts, with events as of `chat_stream_many`."""
        request = requests.text(chat_pb2.TextCompleteStreamRequest, prompts, options, n)
        return self._stream(self._resumable(request, options))

    def render_prompt(self, dialog: Dialog, **options: Unpack[RenderOptions]) -> RenderedPrompt:
        """The prompt of a dialog as token ids and text; the model is not run."""
        request = requests.render_prompt(dialog, options)
        with self._readable_errors():
            response = self._stub.RenderPrompt(request, timeout=requests.deadline(options))
        return results.rendered_prompt(response)

    def tokenize(self, text: str | Dialog, **options: Unpack[TokenizeOptions]) -> Tokenization:
        """The tokens of a text or a dialog, as `complete` and `chat` give them to the model.

        The model is not run, and the context length is no limit.
        """
        [tokenization] = self.tokenize_many([text], **options)
        return tokenization

    def tokenize_many(
        self, texts: Sequence[str | Dialog], **options: Unpack[TokenizeOptions]
    ) -> list[Tokenization]:
        """The tokens of several texts, or of several dialogs, in their order."""
        request = requests.tokenize(texts, options)
        with self._readable_errors():
            response = self._stub.Tokenize(request, timeout=requests.deadline(options))
        return scores.tokenizations(response)

    def detokenize(
        self, ids: Sequence[int], **options: Unpack[DetokenizeOptions]
    ) -> DetokenizedText:
        """The text that token ids stand for, and its bytes; the model is not run."""
        [text] = self.detokenize_many([ids], **options)
        return text

    def detokenize_many(
        self, sequences: Sequence[Sequence[int]], **options: Unpack[DetokenizeOptions]
    ) -> list[DetokenizedText]:
        """The texts of several sequences of token ids, in their order."""
        request = requests.detokenize(sequences, options)
        with self._readable_errors():
            response = self._stub.Detokenize(request, timeout=requests.deadline(options))
        return scores.detokenized_texts(response)

    def score(
        self,
        prompt: Prompt | Dialog,
        candidates: Sequence[Prompt],
        **options: Unpack[ScoreOptions],
    ) -> list[Score]:
        """How probable each candidate is behind a prompt, in their order; nothing is generated.

        Args:
            prompt: a text, token ids, or a dialog whose next answer the candidates are.
            candidates: all texts or all token ids. They are encoded together with the prompt, so
                a word behind a text begins with a space; an answer to a dialog does not.
            options: as of `chat`.
        """
        request = requests.score(prompt, candidates, options)
        with self._readable_errors():
            response = self._stub.Score(request, timeout=requests.deadline(options))
        return scores.scores(response)

    def get_status(self, **options: Unpack[CallOptions]) -> status.GatewayStatus:
        """The gateway's status: its replicas, their load, running and waiting generations."""
        request = requests.get_status(options)
        with self._readable_errors():
            response = self._operator.GetStatus(request, timeout=requests.deadline(options))
        return status.gateway_status(response)

    def get_model(self, **options: Unpack[CallOptions]) -> Model:
        """The served model, with limits and defaults of requests."""
        request = requests.get_model(options)
        with self._readable_errors():
            response = self._stub.GetModel(request, timeout=requests.deadline(options))
        return results.model(response)

    def _resumable(self, request: StreamRequest, options: CallOptions) -> ResumableStream:
        return ResumableStream(request, requests.deadline(options), self._resume_seconds)

    def _stream(self, stream: ResumableStream) -> Stream:
        # The call begins only here, because a generator that is never entered runs no `finally`.
        self._streams.add(stream)
        try:
            while not stream.ended:
                call = self._call(stream)
                try:
                    for response in call:
                        if (event := stream.on_response(response)) is not None:
                            yield event
                    stream.end()
                except grpc.RpcError as error:
                    failure = from_rpc_error(error, self.target)
                    time.sleep(self._pause_after(stream, failure))
                finally:
                    call.cancel()
        finally:
            self._streams.discard(stream)
            self._cancel([stream])

    def _pause_after(self, stream: ResumableStream, error: ChasquiError) -> float:
        try:
            return stream.pause_after(error)
        except UnreachableError as final:
            raise explained(final, self.target, self._tls) from final.__cause__

    def _call(self, stream: ResumableStream) -> Call:
        request, timeout = stream.next_request(), stream.time_left()
        match request:
            case chat_pb2.ChatCompleteStreamRequest():
                return self._stub.ChatCompleteStream(request, timeout=timeout)
            case chat_pb2.TextCompleteStreamRequest():
                return self._stub.TextCompleteStream(request, timeout=timeout)
            case chat_pb2.ResumeStreamRequest():
                return self._stub.ResumeStream(request, timeout=timeout)

    def _cancel(self, streams: Iterable[ResumableStream]) -> None:
        """Cancels streams at the gateway, which would otherwise keep them for a later call."""
        names = [stream.name for stream in streams if stream.wants_cancel]
        cancel_streams(self._stub, names)

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            failure = from_rpc_error(error, self.target)
            raise explained(failure, self.target, self._tls) from error
