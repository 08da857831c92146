"""Every violation of the contract's table, in the middle of streams that must not notice."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import (
    CONTEXT_POLICY_DROP_OLDEST_TURNS,
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    GetModelRequest,
    Message,
    RenderPromptRequest,
    TextCompleteRequest,
)
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from tests.error_details import violations

LONG = "the road crosses rivers on bridges of rope " * 16


def dialog(*roles: Any, content: str = "text") -> Dialog:
    return Dialog(messages=[Message(role=role, content=content) for role in roles])


USER_TURN = dialog(ROLE_USER)


def chat_request(*dialogs: Dialog, **fields: Any) -> ChatCompleteRequest:
    return ChatCompleteRequest(dialogs=dialogs or [USER_TURN], **fields)


def sampling(**fields: Any) -> ChatCompleteRequest:
    return chat_request(sampling=SamplingParams(**fields))


BAD_REQUESTS = {
    "no_dialogs": (ChatCompleteRequest(), "dialogs"),
    "too_many_dialogs": (chat_request(*[USER_TURN] * 65), "dialogs"),
    "empty_dialog": (chat_request(USER_TURN, Dialog()), "dialogs[1].messages"),
    "lone_system": (chat_request(dialog(ROLE_SYSTEM)), "dialogs[0].messages[0].role"),
    "no_role": (chat_request(dialog(0)), "dialogs[0].messages[0].role"),
    "unknown_role": (chat_request(dialog(9)), "dialogs[0].messages[0].role"),
    "late_system": (
        chat_request(USER_TURN, dialog(ROLE_USER, ROLE_SYSTEM, ROLE_USER)),
        "dialogs[1].messages[1].role",
    ),
    "assistant_first": (
        chat_request(dialog(ROLE_ASSISTANT, ROLE_USER)),
        "dialogs[0].messages[0].role",
    ),
    "two_users": (chat_request(dialog(ROLE_USER, ROLE_USER)), "dialogs[0].messages[1].role"),
    "assistant_last": (
        chat_request(dialog(ROLE_USER, ROLE_ASSISTANT)),
        "dialogs[0].messages[1].role",
    ),
    "too_long": (chat_request(USER_TURN, dialog(ROLE_USER, content=LONG)), "dialogs[1]"),
    "last_turn_too_long": (
        chat_request(
            dialog(ROLE_USER, ROLE_ASSISTANT, ROLE_USER, content=LONG),
            context_policy=CONTEXT_POLICY_DROP_OLDEST_TURNS,
        ),
        "dialogs[0]",
    ),
    "unknown_policy": (chat_request(context_policy=9), "context_policy"),
    "temperature": (sampling(temperature=-0.1), "sampling.temperature"),
    "temperature_nan": (sampling(temperature=math.nan), "sampling.temperature"),
    "temperature_infinite": (sampling(temperature=math.inf), "sampling.temperature"),
    "top_p": (sampling(top_p=1.1), "sampling.top_p"),
    "top_k": (sampling(top_k=0), "sampling.top_k"),
    "repetition_penalty": (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "presence_penalty": (sampling(presence_penalty=2.1), "sampling.presence_penalty"),
    "frequency_penalty": (sampling(frequency_penalty=-2.1), "sampling.frequency_penalty"),
    "empty_stop": (sampling(stop=["a", "b", ""]), "sampling.stop[2]"),
    "many_stops": (sampling(stop=["a"] * 17), "sampling.stop"),
    "min_p": (sampling(min_p=-0.1), "sampling.min_p"),
    "min_p_nan": (sampling(min_p=math.nan), "sampling.min_p"),
    "stop_token": (sampling(stop_token_ids=[1, 2, 3, 560]), "sampling.stop_token_ids[3]"),
    "many_stop_tokens": (sampling(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
    "bias_id": (sampling(logit_bias={560: 1}), "sampling.logit_bias[560]"),
    "bias_value": (sampling(logit_bias={5: -101}), "sampling.logit_bias[5]"),
    "top_logprobs": (chat_request(logprobs=True, top_logprobs=21), "top_logprobs"),
    "top_without_logprobs": (chat_request(top_logprobs=1), "top_logprobs"),
    "no_answers": (chat_request(n=0), "n"),
    "many_answers": (chat_request(n=17), "n"),
    "more_answers_than_the_queue": (chat_request(*[USER_TURN] * 17, n=16), "n"),
    "many_continuations": (TextCompleteRequest(prompts=["a"], n=2**32 - 1), "n"),
    "no_prompts": (TextCompleteRequest(), "prompts"),
    "prompts_and_ids": (
        TextCompleteRequest(prompts=["a"], prompt_ids=[TokenIds(ids=[1])]),
        "prompt_ids",
    ),
    "no_ids": (TextCompleteRequest(prompt_ids=[TokenIds()]), "prompt_ids[0].ids"),
    "id_outside": (
        TextCompleteRequest(prompt_ids=[TokenIds(ids=[1, 560])]),
        "prompt_ids[0].ids[1]",
    ),
    "long_prompt": (TextCompleteRequest(prompts=["a", LONG]), "prompts[1]"),
    "many_ids": (TextCompleteRequest(prompt_ids=[TokenIds(ids=[1] * 257)]), "prompt_ids[0]"),
    "render_order": (
        RenderPromptRequest(dialog=dialog(ROLE_ASSISTANT)),
        "dialog.messages[0].role",
    ),
    "render_too_long": (RenderPromptRequest(dialog=dialog(ROLE_USER, content=LONG)), "dialog"),
}


@pytest.fixture
async def undisturbed(chat: Any) -> AsyncIterator[None]:
    """Four greedy streams run during the test, and give what they give without it."""
    steady = ChatCompleteStreamRequest(
        dialogs=[USER_TURN] * 4,
        sampling=SamplingParams(temperature=0, ignore_eos=True, max_gen_len=60),
    )

    async def texts(responses: AsyncIterator[Any]) -> dict[int, str]:
        found: defaultdict[int, str] = defaultdict(str)
        async for response in responses:
            delta = response.event.delta
            found[delta.index] += delta.text
        return found

    expected = await texts(chat.ChatCompleteStream(steady))
    responses = aiter(chat.ChatCompleteStream(steady))
    await anext(responses)
    yield
    assert await texts(responses) == expected


def send(chat: Any, request: Any) -> Any:
    match request:
        case ChatCompleteRequest():
            return chat.ChatComplete(request)
        case TextCompleteRequest():
            return chat.TextComplete(request)
    return chat.RenderPrompt(request)


@pytest.mark.usefixtures("undisturbed")
async def test_each_violation_is_answered_with_its_field_path(chat: Any) -> None:
    calls = [send(chat, request) for request, _ in BAD_REQUESTS.values()]
    answers = await asyncio.gather(*map(asyncio.ensure_future, calls), return_exceptions=True)
    for (name, (_, path)), error in zip(BAD_REQUESTS.items(), answers, strict=True):
        assert isinstance(error, grpc.aio.AioRpcError), name
        assert [field for field, _ in violations(error)] == [path], name
        assert f"{path}: " in str(error.details())


async def test_too_long_prompt_is_told_both_numbers(chat: Any) -> None:
    request = TextCompleteRequest(prompt_ids=[TokenIds(ids=[1] * 300)])
    with pytest.raises(grpc.aio.AioRpcError, match="the prompt has 300 tokens, the context length"):
        await chat.TextComplete(request)


async def test_error_and_answer_carry_the_callers_request_id(chat: Any) -> None:
    metadata = (("x-request-id", "my-own-id"),)
    good = chat.ChatComplete(sampling(max_gen_len=1), metadata=metadata)
    bad = chat.ChatComplete(ChatCompleteRequest(), metadata=metadata)
    for call in (good, bad):
        assert (await call.trailing_metadata())["x-request-id"] == "my-own-id"


async def test_message_above_the_limit_is_refused(chat: Any) -> None:
    limit = (await chat.GetModel(GetModelRequest())).limits.max_request_bytes
    request = TextCompleteRequest(prompts=["x" * limit])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await chat.TextComplete(request)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_passed_deadline_is_answered_as_such(chat: Any) -> None:
    request = sampling(ignore_eos=True, max_gen_len=240)
    with pytest.raises(grpc.aio.AioRpcError) as passed:
        await chat.ChatComplete(request, timeout=0.02)
    assert passed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
