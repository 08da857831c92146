"""An answer does not depend on what runs beside it, and what is cancelled leaves nothing behind."""

import asyncio
from collections.abc import Iterable
from typing import Any

from llama.v1.chat_pb2 import (
    ROLE_USER,
    ChatCompleteRequest,
    ChatCompleteStreamRequest,
    Dialog,
    Message,
    TextCompleteRequest,
)
from llama.v1.model_pb2 import GetLoadRequest
from llama.v1.sampling_pb2 import SamplingParams

GREEDY = SamplingParams(temperature=0, max_gen_len=40)
SEEDED = SamplingParams(temperature=0.8, seed=20_240_229, max_gen_len=40)
ATTEMPTS = 20

WORDS = ["llama", "road", "bridge", "runner", "valley", "maize", "rope", "morning"]
QUESTIONS = [f"What about the {a} and {b}?" for a in WORDS for b in WORDS][:32]


def dialogs(*questions: str) -> list[Dialog]:
    return [Dialog(messages=[Message(role=ROLE_USER, content=question)]) for question in questions]


async def stream(chat: Any, question: str, sampling: SamplingParams) -> list[int]:
    """The ids that a stream tells."""
    request = ChatCompleteStreamRequest(dialogs=dialogs(question), sampling=sampling, logprobs=True)
    responses = chat.ChatCompleteStream(request)
    return [token.id async for each in responses for token in each.event.delta.tokens]


async def alone(chat: Any, questions: Iterable[str], sampling: SamplingParams) -> list[list[int]]:
    return [await stream(chat, question, sampling) for question in questions]


async def together(
    chat: Any, questions: Iterable[str], sampling: SamplingParams
) -> list[list[int]]:
    return await asyncio.gather(*(stream(chat, question, sampling) for question in questions))


async def test_32_concurrent_streams_give_the_tokens_that_each_gives_alone(chat: Any) -> None:
    expected = await alone(chat, QUESTIONS, GREEDY)
    assert await together(chat, QUESTIONS, GREEDY) == expected
    assert len(set(map(tuple, expected))) > 16


async def test_seeded_answer_is_the_same_alone_and_beside_15_others(chat: Any) -> None:
    expected = await alone(chat, QUESTIONS[:2], SEEDED)
    assert (await together(chat, QUESTIONS[:16], SEEDED))[:2] == expected
    other = SamplingParams(temperature=0.8, seed=SEEDED.seed + 1, max_gen_len=40)
    assert await alone(chat, QUESTIONS[:2], other) != expected


async def test_reported_seed_reproduces_the_answer(chat: Any) -> None:
    drawn = SamplingParams(temperature=1.5, max_gen_len=30, ignore_eos=True)
    request = ChatCompleteRequest(dialogs=dialogs(*QUESTIONS[:1] * 2), sampling=drawn)
    first, second = (await chat.ChatComplete(request)).predictions
    assert first.text != second.text
    drawn.seed = second.sampling.seed
    request = ChatCompleteRequest(dialogs=dialogs(QUESTIONS[0]), sampling=drawn)
    [repeated] = (await chat.ChatComplete(request)).predictions
    assert repeated.text == second.text
    assert repeated.fingerprint == second.fingerprint


async def test_200_streams_of_which_every_other_is_cancelled_leave_nothing_behind(
    chat: Any, idle_load: Any
) -> None:
    endless = SamplingParams(temperature=1, ignore_eos=True, max_gen_len=200)
    short = SamplingParams(temperature=1, ignore_eos=True, max_gen_len=20)

    async def run(number: int) -> None:
        request = ChatCompleteStreamRequest(
            dialogs=dialogs(QUESTIONS[number % 32]), sampling=endless if number % 2 else short
        )
        call = chat.ChatCompleteStream(request)
        if number % 2 == 0:
            assert [response.event async for response in call][-1].HasField("finished")
            return
        for _ in range(1 + number % 7):  # some while they wait, some in the middle
            await call.read()
        call.cancel()

    await asyncio.gather(*map(run, range(200)))
    load = await idle_load()
    assert load.free_blocks == load.total_blocks
    assert load.outstanding_tokens == 0


async def test_cancelled_unary_call_leaves_nothing_behind(
    chat: Any, model_service: Any, idle_load: Any
) -> None:
    endless = SamplingParams(temperature=1, ignore_eos=True, max_gen_len=200)
    cancelled = 0
    for _ in range(ATTEMPTS):  # where this process is slow, all may have ended before it looks
        calls = [
            chat.TextComplete(TextCompleteRequest(prompts=["one", "two"], sampling=endless))
            for _ in range(8)
        ]
        while not all(call.done() for call in calls):
            running = (await model_service.GetLoad(GetLoadRequest())).running_sequences
            if running >= len(calls):
                cancelled += sum(call.cancel() for call in calls)
                break
        if cancelled:
            break
    assert cancelled
    load = await idle_load()
    assert load.free_blocks == load.total_blocks
