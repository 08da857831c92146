"""Several answers to one dialog, by both clients."""

from typing import Any

import pytest

from client import AsyncClient, Client, Delta, Event, Message, Started, results
from llama.v1 import chat_pb2

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
SAMPLED: Any = {"temperature": 1.2, "seed": 2**64 - 1, "max_gen_len": 12}


def test_each_choice_is_the_answer_to_its_own_seed(target: str) -> None:
    with Client(target) as client:
        answers = client.chat_choices(HELLO, 3, **SAMPLED)
        alone = [client.chat(HELLO, **{**SAMPLED, "seed": each.seed}) for each in answers]

    assert [each.choice_index for each in answers] == [0, 1, 2]
    assert [each.seed for each in answers] == [2**64 - 1, 0, 1]
    assert [each.text for each in answers] == [each.text for each in alone]


async def test_both_clients_give_the_same_choices(target: str) -> None:
    with Client(target) as client:
        chats = client.chat_choices(HELLO, 2, **SAMPLED)
        texts = client.complete_many(["Once", "Twice"], n=2, **SAMPLED)
    async with AsyncClient(target) as asyncio_client:
        again = await asyncio_client.chat_choices(HELLO, 2, **SAMPLED)
        events = [
            event
            async for event in asyncio_client.complete_stream_many(
                ["Once", "Twice"], n=2, **SAMPLED
            )
        ]

    assert [each.text for each in again] == [each.text for each in chats]
    assert [each.choice_index for each in texts] == [0, 1, 0, 1]
    assert joined(events) == {
        (0, 0): texts[0].text,
        (0, 1): texts[1].text,
        (1, 0): texts[2].text,
        (1, 1): texts[3].text,
    }


def joined(events: list[Event]) -> dict[tuple[int, int], str]:
    """The text of each answer."""
    texts = {(each.index, each.choice_index): "" for each in events}
    for event in events:
        if isinstance(event, Delta):
            texts[event.index, event.choice_index] += event.text
    return texts


def test_one_answer_takes_no_n(target: str) -> None:
    with Client(target) as client, pytest.raises(TypeError, match="'n'"):
        client.chat(HELLO, n=2)  # type: ignore[call-arg]


def test_prompt_tokens_from_the_cache_are_told() -> None:
    usage = chat_pb2.Usage(prompt_tokens=9, cached_prompt_tokens=8)
    answer = results.prediction(chat_pb2.Prediction(usage=usage, choice_index=2))

    assert answer.usage.cached_prompt_tokens == 8
    assert answer.choice_index == 2


def test_results_tell_of_lost_replicas_and_of_the_classifiers_findings() -> None:
    found: dict[str, Any] = {"failovers": 2, "safety_categories": ["weapons"]}
    finished = chat_pb2.StreamEvent(finished=chat_pb2.Finished(**found))
    for result in (results.prediction(chat_pb2.Prediction(**found)), results.event(finished)):
        assert not isinstance(result, Started | Delta)
        assert (result.failovers, result.safety_categories) == (2, ("weapons",))
