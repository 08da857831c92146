"""The public servicer: each RPC from its request to its answer, one step after the other. Checks
come first and cost nothing; from admission on, all happens inside of `with` blocks that give back
what the request holds, however it ends.
"""

import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from gateway.admission.admission import Admission, Admitted
from gateway.generation.completion import (
    SPECIAL_TAGS_REFUSAL,
    Generations,
    Place,
    PlacedEvent,
    Refusal,
    complete,
)
from gateway.generation.send_buffer import UnreadEvents
from gateway.request.prompts import Encode, Prompt, Window, encode_dialogs, encode_texts
from gateway.request.read_dialogs import Dialogs, read_dialog, read_dialogs
from gateway.request.validation import (
    ChatRequest,
    Options,
    RequestLimits,
    TextRequest,
    chat_violations,
    default_max_gen_len,
    options,
    render_violations,
    stream_name_violations,
    text_violations,
)
from gateway.rpc.access import authorizer, connection_options
from gateway.rpc.access_log import Accounting
from gateway.rpc.messages import model_response, prediction_message, stream_event
from gateway.rpc.metrics import RequestMetrics, StateMetrics
from gateway.rpc.named_streams import NamedStreams
from gateway.rpc.operator import OPERATOR_SERVICE_NAME, OperatorServicer
from gateway.rpc.unary import add_tokens, fold, size_violations, within
from gateway.rpc.upstreams import Backend
from gateway.safety.classifier import Subject
from gateway.safety.guard import Guard, dialogs_to_judge
from gateway.settings import GatewaySettings
from gateway.text.detokenizer import text_of
from llama.prompt_format.dialog import drop_oldest_turns, render
from llama.v1 import chat_pb2, chat_pb2_grpc, operator_pb2_grpc
from serving.errors import RequestError, Violation, invalid_argument
from serving.security import caller
from serving.server import Health, Service

SERVICE_NAME = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
# Seconds; None where there is no deadline.
TimeRemaining = Callable[[], float | None]


def gateway_service(backend: Backend, settings: GatewaySettings) -> Service:
    """The service as `serving` runs it. When it drains, named streams are refused first, and a
    moment later all new requests for answers. Named streams that run can be resumed until they end.
    """
    streams = NamedStreams(settings.stream_limits)
    requests = RequestMetrics()
    servicer = ChatServicer(backend, settings, streams, requests)
    operator = OperatorServicer(backend, servicer.admission, streams)

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
        authorize=authorizer(settings),
        options=connection_options(settings),
        collectors=[requests, StateMetrics(backend, servicer.admission, streams)],
        trusts_traceparent=settings.trust_traceparent,
    )


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    def __init__(
        self,
        backend: Backend,
        settings: GatewaySettings,
        streams: NamedStreams,
        metrics: RequestMetrics,
    ) -> None:
        self._tokenizer = backend.tokenizer
        self._replicas = backend.replicas
        self._classifier = backend.classifier
        self._settings = settings
        self._limits = settings.request_limits
        self.admission = Admission(settings.admission_bounds, lambda: backend.replicas.places)
        self._streams = streams
        self._accounting = Accounting(metrics, log_client_addresses=settings.log_client_addresses)

    async def ChatComplete(
        self, request: chat_pb2.ChatCompleteRequest, context: Context
    ) -> chat_pb2.ChatCompleteResponse:
        made = self._chat(request, context)
        del request  # which may have megabytes, and is not needed while the answers are made
        async with aclosing(made) as events:
            predictions = await fold(events)
        response = chat_pb2.ChatCompleteResponse(predictions=map(prediction_message, predictions))
        for message, prediction in zip(response.predictions, predictions, strict=True):
            await add_tokens(message, prediction)
        return response

    async def ChatCompleteStream(
        self, request: chat_pb2.ChatCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ChatCompleteStreamResponse]:
        made = _numbered(self._chat(request, context))
        named = self._named(request, made, context)
        del request
        async with aclosing(named) as events:
            async for event in events:
                yield chat_pb2.ChatCompleteStreamResponse(event=event)

    async def TextComplete(
        self, request: chat_pb2.TextCompleteRequest, context: Context
    ) -> chat_pb2.TextCompleteResponse:
        made = self._text(request, context)
        del request  # which may have megabytes, and is not needed while the answers are made
        async with aclosing(made) as events:
            predictions = await fold(events)
        response = chat_pb2.TextCompleteResponse(predictions=map(prediction_message, predictions))
        for message, prediction in zip(response.predictions, predictions, strict=True):
            await add_tokens(message, prediction)
        return response

    async def TextCompleteStream(
        self, request: chat_pb2.TextCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.TextCompleteStreamResponse]:
        made = _numbered(self._text(request, context))
        named = self._named(request, made, context)
        del request
        async with aclosing(named) as events:
            async for event in events:
                yield chat_pb2.TextCompleteStreamResponse(event=event)

    async def ResumeStream(
        self, request: chat_pb2.ResumeStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ResumeStreamResponse]:
        _refuse(stream_name_violations(request.stream_name))
        stream = self._streams.resume(request.stream_name, request.after_event_number)
        async with aclosing(stream) as events:
            async for event in events:
                yield chat_pb2.ResumeStreamResponse(event=event)

    async def CancelStream(
        self, request: chat_pb2.CancelStreamRequest, context: Context
    ) -> chat_pb2.CancelStreamResponse:
        _refuse(stream_name_violations(request.stream_name))
        await self._streams.cancel(request.stream_name)
        return chat_pb2.CancelStreamResponse()

    async def RenderPrompt(
        self, request: chat_pb2.RenderPromptRequest, context: Context
    ) -> chat_pb2.RenderPromptResponse:
        window, read = self._window(), Dialogs()
        max_gen_len = default_max_gen_len(window.length)
        if request.HasField("max_gen_len"):
            max_gen_len = request.max_gen_len
        read_dialog("dialog", request.dialog, self._limits, into=read)
        _refuse(render_violations(request, read.violations))
        # It runs nothing, but takes a place while it is encoded: that is work, too.
        with self.admission.admit(1, 0, context.time_remaining()):
            [prompt] = await encode_dialogs(
                read.messages,
                self._encoder(context.time_remaining),
                window,
                answer_room=_answer_room(request.context_policy, window, max_gen_len),
            )
        kept = drop_oldest_turns(read.messages["dialog"], prompt.dropped_turns)
        return chat_pb2.RenderPromptResponse(
            ids=prompt.ids,
            segments=[segment.text for segment in render(kept)],
            prompt_tokens=len(prompt.ids),
            remaining_tokens=window.length - len(prompt.ids),
            dropped_turns=prompt.dropped_turns,
            has_special_tags=bool(read.unsafe),
        )

    async def GetModel(
        self,
        request: chat_pb2.GetModelRequest,
        context: Context,
    ) -> chat_pb2.GetModelResponse:
        return model_response(
            self._replicas.model,
            self._replicas.ready_count,
            self._callers_limits(),
            self._settings,
        )

    def _chat(self, request: ChatRequest, context: Context) -> AsyncGenerator[PlacedEvent, None]:
        events = self._chat_events(request, context.time_remaining)
        if isinstance(request, chat_pb2.ChatCompleteRequest):
            events = within(events, self._settings.max_response_bytes)
        return self._accounting.follow(events, request, context)

    def _text(self, request: TextRequest, context: Context) -> AsyncGenerator[PlacedEvent, None]:
        events = self._text_events(request, context.time_remaining)
        if isinstance(request, chat_pb2.TextCompleteRequest):
            events = within(events, self._settings.max_response_bytes)
        return self._accounting.follow(events, request, context)

    async def _chat_events(
        self, request: ChatRequest, time_remaining: TimeRemaining
    ) -> AsyncGenerator[PlacedEvent, None]:
        arrived = time.monotonic()
        vocabulary, window = self._tokenizer.vocabulary, self._window()
        limits = self._callers_limits()
        read = await read_dialogs(request.dialogs, limits)
        _refuse(chat_violations(request, read.violations, limits, len(vocabulary)))
        chosen = options(request, window.length)
        max_gen_len = chosen.sampling.max_gen_len
        sequences = len(read.safe) * chosen.n
        self._refuse_large_answer(request, chosen, sequences)
        answer_room = _answer_room(request.context_policy, window, max_gen_len)
        lasting = _lasting(request, time_remaining)
        del request  # as its callers have done
        with self.admission.admit(sequences, chosen.priority, time_remaining()) as admitted:
            prompts = await self._prompts(read, window, answer_room, time_remaining)
            subjects = (
                []
                if self._classifier is None
                else dialogs_to_judge(prompts, [*read.messages.values()])
            )
            del read
            events = await self._begin(
                prompts, subjects, chosen, admitted, lasting, arrived=arrived
            )
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _text_events(
        self, request: TextRequest, time_remaining: TimeRemaining
    ) -> AsyncGenerator[PlacedEvent, None]:
        arrived = time.monotonic()
        vocabulary, window = self._tokenizer.vocabulary, self._window()
        _refuse(text_violations(request, self._callers_limits(), len(vocabulary), window))
        chosen = options(request, window.length)
        sequences = (len(request.prompts) + len(request.prompt_ids)) * chosen.n
        self._refuse_large_answer(request, chosen, sequences)
        with self.admission.admit(sequences, chosen.priority, time_remaining()) as admitted:
            if request.prompt_ids:
                prompts = [Prompt(list(each.ids)) for each in request.prompt_ids]
            else:
                prompts = await encode_texts(
                    {f"prompts[{i}]": text for i, text in enumerate(request.prompts)},
                    self._encoder(time_remaining),
                    window,
                )
            subjects: list[Subject] = []
            if self._classifier is not None:
                subjects += request.prompts
                subjects = subjects or [text_of(prompt.ids, vocabulary) for prompt in prompts]
            lasting = _lasting(request, time_remaining)
            del request
            events = await self._begin(
                prompts, subjects, chosen, admitted, lasting, arrived=arrived
            )
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _prompts(
        self,
        read: Dialogs,
        window: Window,
        answer_room: int | None,
        time_remaining: TimeRemaining,
    ) -> list[Prompt | Refusal]:
        """For each dialog what the model is given, or the answer without it."""
        safe, encode = read.safe, self._encoder(time_remaining)
        encoded = await encode_dialogs(safe, encode, window, answer_room=answer_room)
        by_path = dict(zip(safe, encoded, strict=True))
        return [by_path.get(path, SPECIAL_TAGS_REFUSAL) for path in read.messages]

    def _refuse_large_answer(
        self, request: ChatRequest | TextRequest, chosen: Options, sequences: int
    ) -> None:
        if isinstance(request, chat_pb2.ChatCompleteRequest | chat_pb2.TextCompleteRequest):
            vocabulary, limit = self._tokenizer.vocabulary, self._settings.max_response_bytes
            _refuse(size_violations(chosen, sequences, self._window(), vocabulary, limit))

    def _window(self) -> Window:
        """UNAVAILABLE while there is no tokenizer service or no replica."""
        max_token_bytes = self._tokenizer.vocabulary.max_token_bytes
        return Window(self._replicas.model.context_length, max_token_bytes)

    def _callers_limits(self) -> RequestLimits:
        return self._limits.within(caller.current().limits)

    def _named(
        self,
        request: chat_pb2.ChatCompleteStreamRequest | chat_pb2.TextCompleteStreamRequest,
        events: AsyncGenerator[chat_pb2.StreamEvent, None],
        context: Context,
    ) -> AsyncGenerator[chat_pb2.StreamEvent, None]:
        """The events by way of a named stream, if there is a name."""
        if not request.stream_name:
            return events
        try:
            return self._streams.open(request.stream_name, events, context.time_remaining())
        except RequestError:
            # `events`, which will not begin, would have accounted for the request.
            with self._accounting.of_refused(request, context):
                raise

    async def _begin(
        self,
        prompts: Sequence[Prompt | Refusal],
        subjects: Sequence[Subject],
        chosen: Options,
        admitted: Admitted,
        time_remaining: TimeRemaining,
        *,
        arrived: float,
    ) -> AsyncGenerator[PlacedEvent, None]:
        """The events of a request's generations; `subjects` are what its prompts were made of."""
        guard = None
        if self._classifier is not None:
            guard = Guard(self._classifier, subjects, chosen, time_remaining)
            prompts = await guard.check(prompts)
        # Here and not in `complete`, which the guard has tasks of its own read.
        unread = UnreadEvents[Place](self._settings.max_unread_bytes * len(prompts) * chosen.n)
        generations = Generations()
        events = complete(
            prompts,
            chosen,
            self._tokenizer.vocabulary,
            self._replicas,
            admitted,
            arrived=arrived,
            made=unread,
            generations=generations,
        )
        return events if guard is None else guard.watch(events, generations.cancel)

    def _encoder(self, time_remaining: TimeRemaining) -> Encode:
        """Encoding within what is left of the caller's deadline."""
        return functools.partial(self._tokenizer.encode, time_remaining=time_remaining)


async def _numbered(
    events: AsyncGenerator[PlacedEvent, None],
) -> AsyncGenerator[chat_pb2.StreamEvent, None]:
    """The events as messages, numbered from 1."""
    event_number = 0
    async with aclosing(events):
        async for place, event in events:
            event_number += 1
            yield stream_event(event_number, place, event)


def _lasting(request: ChatRequest | TextRequest, time_remaining: TimeRemaining) -> TimeRemaining:
    """What is left while answers are made: a named stream outlives the call that began it."""
    return (lambda: None) if getattr(request, "stream_name", "") else time_remaining


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise invalid_argument(violations)


def _answer_room(
    policy: "chat_pb2.ContextPolicy.ValueType", window: Window, max_gen_len: int
) -> int | None:
    """The room that dropping turns keeps for an answer; None where no turns may be dropped."""
    if policy != chat_pb2.CONTEXT_POLICY_DROP_OLDEST_TURNS:
        return None
    return window.answer_room(max_gen_len)
