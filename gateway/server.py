"""The public servicer: each RPC of ChatService, and the gateway's service as `serving` runs it."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

import grpc

from gateway.admission.admission import Admission
from gateway.generation.events import KeyedEvent
from gateway.http.listener import http_front
from gateway.request.tokenization import detokenize, render_prompt, tokenize
from gateway.request.validation import stream_name_violations
from gateway.rpc.access import authorizer, connection_options
from gateway.rpc.access_log import Accounting, Context
from gateway.rpc.messages import stream_response
from gateway.rpc.metrics import RequestMetrics, StateMetrics
from gateway.rpc.model_message import model_response
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.operator import OPERATOR_SERVICE_NAME, OperatorServicer
from gateway.rpc.pipeline import Pipeline, PipelineLimits, refuse
from gateway.rpc.unary import score_response, unary_response
from gateway.rpc.upstreams import Backend
from gateway.settings import GatewaySettings
from llama.v1 import chat_pb2, chat_pb2_grpc, operator_pb2_grpc
from serving.errors import RequestError
from serving.server import Health, Service

SERVICE_NAME = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name


def gateway_service(backend: Backend, settings: GatewaySettings) -> Service:
    """The service as `serving` runs it. When it drains, new named streams are refused first, and a
    moment later all new completion requests. Running named streams can be resumed until they end.
    """
    streams = NamedStreams(settings.stream_limits)
    requests = RequestMetrics(lambda: backend.replicas.latest_model.name)
    servicer = ChatServicer(backend, settings, streams, requests)
    operator = OperatorServicer(backend, servicer.admission, streams)
    authorize = authorizer(settings.api_keys)

    def register(server: grpc.aio.Server) -> None:
        chat_pb2_grpc.add_ChatServiceServicer_to_server(servicer, server)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(operator, server)

    async def drain() -> None:
        servicer.admission.close()
        await streams.drain()

    async def run(health: Health) -> None:
        try:
            await backend.run(health)
        finally:
            await streams.close()

    return Service(
        names=[SERVICE_NAME, OPERATOR_SERVICE_NAME],
        register=register,
        run=run,
        begin_drain=streams.refuse_new,
        drain=drain,
        authorize=authorize,
        options=connection_options(settings.max_connection_age, settings.grace_period),
        collectors=[requests, StateMetrics(backend, servicer.admission, streams)],
        trusts_traceparent=settings.trust_traceparent,
        front=http_front(
            settings.http_options, servicer.pipeline, backend.replicas, streams, authorize
        ),
    )


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    def __init__(
        self,
        backend: Backend,
        settings: GatewaySettings,
        streams: NamedStreams,
        metrics: RequestMetrics,
    ) -> None:
        self._replicas = backend.replicas
        self._settings = settings
        self.admission = Admission(
            settings.admission_bounds, lambda: backend.replicas.batch_capacity
        )
        self._streams = streams
        log_client_addresses = settings.log_client_addresses
        accounting = Accounting(metrics, log_client_addresses=log_client_addresses)
        limits = PipelineLimits(
            settings.request_limits, settings.max_response_bytes, settings.max_unread_bytes
        )
        self.pipeline = Pipeline(backend, limits, self.admission, accounting)

    async def ChatComplete(
        self, request: chat_pb2.ChatCompleteRequest, context: Context
    ) -> chat_pb2.ChatCompleteResponse:
        events = self.pipeline.run(request, context)
        del request  # can have megabytes, and is not needed while the answers are made
        return await unary_response(chat_pb2.ChatCompleteResponse, events)

    def ChatCompleteStream(
        self, request: chat_pb2.ChatCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ChatCompleteStreamResponse]:
        responses = self._stream(request, context)
        return cast("AsyncIterator[chat_pb2.ChatCompleteStreamResponse]", responses)

    async def TextComplete(
        self, request: chat_pb2.TextCompleteRequest, context: Context
    ) -> chat_pb2.TextCompleteResponse:
        events = self.pipeline.run(request, context)
        del request  # can have megabytes, and is not needed while the answers are made
        return await unary_response(chat_pb2.TextCompleteResponse, events)

    def TextCompleteStream(
        self, request: chat_pb2.TextCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.TextCompleteStreamResponse]:
        responses = self._stream(request, context)
        return cast("AsyncIterator[chat_pb2.TextCompleteStreamResponse]", responses)

    def ResumeStream(
        self, request: chat_pb2.ResumeStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ResumeStreamResponse]:
        refuse(stream_name_violations(request.stream_name))
        responses = self._streams.resume(request.stream_name, request.after_event_number)
        return cast("AsyncIterator[chat_pb2.ResumeStreamResponse]", responses)

    async def CancelStream(
        self, request: chat_pb2.CancelStreamRequest, context: Context
    ) -> chat_pb2.CancelStreamResponse:
        refuse(stream_name_violations(request.stream_name))
        await self._streams.cancel(request.stream_name)
        return chat_pb2.CancelStreamResponse()

    async def RenderPrompt(
        self, request: chat_pb2.RenderPromptRequest, context: Context
    ) -> chat_pb2.RenderPromptResponse:
        return await render_prompt(request, self.pipeline.tokenizer_tools(request.model, context))

    async def Tokenize(
        self, request: chat_pb2.TokenizeRequest, context: Context
    ) -> chat_pb2.TokenizeResponse:
        return await tokenize(request, self.pipeline.tokenizer_tools(request.model, context))

    async def Detokenize(
        self, request: chat_pb2.DetokenizeRequest, context: Context
    ) -> chat_pb2.DetokenizeResponse:
        return await detokenize(request, self.pipeline.tokenizer_tools(request.model, context))

    async def Score(
        self, request: chat_pb2.ScoreRequest, context: Context
    ) -> chat_pb2.ScoreResponse:
        events = self.pipeline.run(request, context)
        del request  # can have megabytes, and is not needed while the candidates are scored
        return await score_response(events)

    async def GetModel(
        self,
        request: chat_pb2.GetModelRequest,
        context: Context,
    ) -> chat_pb2.GetModelResponse:
        self.pipeline.require_model(request.model)
        return model_response(
            self._replicas.model,
            self._replicas.ready_count,
            self.pipeline.limits(),
            prompt_format=self.pipeline.prompt_format,
            max_request_bytes=self._settings.max_request_bytes,
            max_response_bytes=self._settings.max_response_bytes,
        )

    def _stream(
        self,
        request: chat_pb2.ChatCompleteStreamRequest | chat_pb2.TextCompleteStreamRequest,
        context: Context,
    ) -> AsyncGenerator[bytes, None]:
        """The serialized responses of a stream; with a stream_name, through a named stream."""
        responses = _serialized(self.pipeline.run(request, context))
        if not request.stream_name:
            return responses
        try:
            return self._streams.open(request.stream_name, responses, context.time_remaining())
        except RequestError:
            # `responses`, which would account for the request, never starts.
            with self.pipeline.accounting.account(request, context):
                raise


async def _serialized(events: AsyncGenerator[KeyedEvent, None]) -> AsyncGenerator[bytes, None]:
    """The events as responses, numbered from 1."""
    event_number = 0
    async with aclosing(events):
        async for key, event in events:
            event_number += 1
            yield stream_response(event_number, key, event)
