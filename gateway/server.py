"""The public servicer: each RPC from its request to its answer, one step after the other. Checks
come first and cost nothing; from admission on, all happens inside of `with` blocks that give back
what the request holds, however it ends.
"""

import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from gateway.admission import Admission
from gateway.backend import Backend
from gateway.classifier import Subject
from gateway.completion import (
    SPECIAL_TAGS_REFUSAL,
    Generations,
    PlacedEvent,
    Refusal,
    complete,
    fold,
)
from gateway.detokenizer import text_of
from gateway.dialog import drop_oldest_turns, has_special_tags, render
from gateway.messages import (
    chat_event,
    chat_prediction,
    model_response,
    text_event,
    text_prediction,
)
from gateway.prompts import Encode, Prompt, encode_dialogs, encode_texts, take_ids
from gateway.request import (
    ChatRequest,
    Options,
    TextRequest,
    chat_violations,
    options,
    parse_dialog,
    render_violations,
    text_violations,
)
from gateway.safety import Guard
from gateway.settings import GatewaySettings
from llama.v1 import chat_pb2, chat_pb2_grpc
from serving.errors import Violation, invalid_argument
from serving.server import Service

SERVICE_NAME = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


def gateway_service(backend: Backend, settings: GatewaySettings) -> Service:
    """The service as `serving` runs it. It needs no drain: its streams end with their answers."""

    def register(server: grpc.aio.Server) -> None:
        servicer = ChatServicer(backend, settings)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(servicer, server)

    return Service(names=[SERVICE_NAME], register=register, run=backend.run)


class ChatServicer(chat_pb2_grpc.ChatServiceServicer):
    def __init__(self, backend: Backend, settings: GatewaySettings) -> None:
        self._tokenizer = backend.tokenizer
        self._replicas = backend.replicas
        self._classifier = backend.classifier
        self._settings = settings
        self._limits = settings.request_limits
        self._admission = Admission(settings.max_queued_sequences)

    async def ChatComplete(
        self, request: chat_pb2.ChatCompleteRequest, context: Context
    ) -> chat_pb2.ChatCompleteResponse:
        async with aclosing(self._chat(request, context)) as events:
            predictions = await fold(events)
        return chat_pb2.ChatCompleteResponse(predictions=map(chat_prediction, predictions))

    async def ChatCompleteStream(
        self, request: chat_pb2.ChatCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.ChatCompleteStreamResponse]:
        sequence = 0
        async with aclosing(self._chat(request, context)) as events:
            async for place, event in events:
                sequence += 1
                yield chat_event(sequence, place, event)

    async def TextComplete(
        self, request: chat_pb2.TextCompleteRequest, context: Context
    ) -> chat_pb2.TextCompleteResponse:
        async with aclosing(self._text(request, context)) as events:
            predictions = await fold(events)
        return chat_pb2.TextCompleteResponse(predictions=map(text_prediction, predictions))

    async def TextCompleteStream(
        self, request: chat_pb2.TextCompleteStreamRequest, context: Context
    ) -> AsyncIterator[chat_pb2.TextCompleteStreamResponse]:
        sequence = 0
        async with aclosing(self._text(request, context)) as events:
            async for place, event in events:
                sequence += 1
                yield text_event(sequence, place, event)

    async def RenderPrompt(
        self, request: chat_pb2.RenderPromptRequest, context: Context
    ) -> chat_pb2.RenderPromptResponse:
        model = self._replicas.model
        _refuse(render_violations(request, self._limits))
        messages = parse_dialog(request.dialog)
        [prompt] = await encode_dialogs(
            {"dialog": messages},
            self._encoder(context),
            model.context_length,
            drop_oldest_turns=_drops(request.context_policy),
        )
        kept = drop_oldest_turns(messages, prompt.dropped_turns)
        return chat_pb2.RenderPromptResponse(
            ids=prompt.ids,
            segments=[segment.text for segment in render(kept)],
            prompt_tokens=len(prompt.ids),
            remaining_tokens=model.context_length - len(prompt.ids),
            dropped_turns=prompt.dropped_turns,
            unsafe=has_special_tags(messages),
        )

    async def GetModel(
        self,
        request: chat_pb2.GetModelRequest,
        context: Context,
    ) -> chat_pb2.GetModelResponse:
        return model_response(self._replicas.model, self._replicas.ready_count, self._settings)

    async def _chat(
        self, request: ChatRequest, context: Context
    ) -> AsyncGenerator[PlacedEvent, None]:
        arrived = time.monotonic()
        vocabulary, model = self._tokenizer.vocabulary, self._replicas.model
        _refuse(chat_violations(request, self._limits, len(vocabulary)))
        dialogs = {
            f"dialogs[{index}]": parse_dialog(each) for index, each in enumerate(request.dialogs)
        }
        safe = {path: each for path, each in dialogs.items() if not has_special_tags(each)}
        chosen = options(request, model.context_length)
        with self._admission.admit(len(safe) * chosen.n):
            encoded = await encode_dialogs(
                safe,
                self._encoder(context),
                model.context_length,
                drop_oldest_turns=_drops(request.context_policy),
            )
            by_path = dict(zip(safe, encoded, strict=True))
            prompts = [by_path.get(path, SPECIAL_TAGS_REFUSAL) for path in dialogs]
            subjects = [*dialogs.values()]
            events = await self._begin(prompts, subjects, chosen, context, arrived=arrived)
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _text(
        self, request: TextRequest, context: Context
    ) -> AsyncGenerator[PlacedEvent, None]:
        arrived = time.monotonic()
        vocabulary, model = self._tokenizer.vocabulary, self._replicas.model
        _refuse(text_violations(request, self._limits, len(vocabulary)))
        chosen = options(request, model.context_length)
        with self._admission.admit((len(request.prompts) + len(request.prompt_ids)) * chosen.n):
            if request.prompt_ids:
                given = {f"prompt_ids[{i}]": list(p.ids) for i, p in enumerate(request.prompt_ids)}
                prompts = take_ids(given, model.context_length)
            else:
                texts = {f"prompts[{i}]": text for i, text in enumerate(request.prompts)}
                prompts = await encode_texts(texts, self._encoder(context), model.context_length)
            subjects = [*request.prompts]
            if self._classifier is not None and request.prompt_ids:
                subjects = [text_of(prompt.ids, vocabulary) for prompt in prompts]
            events = await self._begin(prompts, subjects, chosen, context, arrived=arrived)
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _begin(
        self,
        prompts: Sequence[Prompt | Refusal],
        subjects: Sequence[Subject],
        chosen: Options,
        context: Context,
        *,
        arrived: float,
    ) -> AsyncGenerator[PlacedEvent, None]:
        """The events of a request's generations; `subjects` are what its prompts were made of."""
        guard = None
        if self._classifier is not None:
            guard = Guard(self._classifier, subjects, chosen, context.time_remaining)
            prompts = await guard.check(prompts)
        generations = Generations()
        events = complete(
            prompts,
            chosen,
            self._tokenizer.vocabulary,
            self._replicas,
            arrived=arrived,
            generations=generations,
        )
        return events if guard is None else guard.watch(events, generations.cancel)

    def _encoder(self, context: Context) -> Encode:
        """Encoding within what is left of the caller's deadline."""
        return functools.partial(self._tokenizer.encode, time_remaining=context.time_remaining)


def _refuse(violations: Sequence[Violation]) -> None:
    if violations:
        raise invalid_argument(violations)


def _drops(policy: "chat_pb2.ContextPolicy.ValueType") -> bool:
    return policy == chat_pb2.CONTEXT_POLICY_DROP_OLDEST_TURNS
