"""The synchronous and the asyncio client against real services."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from client import (
    AsyncClient,
    Client,
    Delta,
    Determinism,
    Event,
    Finished,
    FinishReason,
    InvalidRequestError,
    Message,
    Started,
)

HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
DIALOGS: list[list[Message]] = [
    HELLO,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
]


def texts(events: list[Event], count: int) -> list[str]:
    """The joined text of each of `count` dialogs or prompts."""
    deltas = [event for event in events if isinstance(event, Delta)]
    return ["".join(each.text for each in deltas if each.index == n) for n in range(count)]


def test_streams_join_to_the_unary_answers(target: str) -> None:
    with Client(target) as client:
        predictions = client.chat_many(DIALOGS, seed=1, max_gen_len=20)
        events = list(client.chat_stream_many(DIALOGS, seed=1, max_gen_len=20))

    assert texts(events, len(DIALOGS)) == [each.content for each in predictions]
    for index, prediction in enumerate(predictions):
        of_this = [event for event in events if event.index == index]
        first, last = of_this[0], of_this[-1]
        assert isinstance(first, Started)
        assert isinstance(last, Finished)
        assert first.prompt_tokens == prediction.usage.prompt_tokens
        assert last.finish_reason is prediction.finish_reason


async def test_both_clients_answer_alike(target: str) -> None:
    with Client(target) as client:
        chat = client.chat(HELLO, seed=1, max_gen_len=20)
        text = client.complete("Once", seed=1, max_gen_len=20)
    async with AsyncClient(target) as asyncio_client:
        chat_events = [e async for e in asyncio_client.chat_stream(HELLO, seed=1, max_gen_len=20)]
        text_events = [
            e async for e in asyncio_client.complete_stream("Once", seed=1, max_gen_len=20)
        ]
        rendered = await asyncio_client.render_prompt(HELLO)

        assert texts(chat_events, 1) == [chat.content]
        assert texts(text_events, 1) == [text.text]
        assert rendered.prompt_tokens == chat.usage.prompt_tokens
        assert (await asyncio_client.chat(HELLO, seed=1, max_gen_len=20)).content == chat.content
        assert (await asyncio_client.complete("Once", seed=1, max_gen_len=20)).text == text.text


def test_an_answer_continues_its_dialog(target: str) -> None:
    with Client(target) as client:
        prediction = client.chat(HELLO, temperature=0, max_gen_len=8)
        dialog = [*HELLO, prediction.message, *HELLO]
        rendered = client.render_prompt(dialog)

    assert prediction.content.strip() in rendered.segments[0]
    assert len(rendered.segments) == 2
    assert rendered.prompt_tokens == len(rendered.ids)


def test_logprobs_come_with_their_alternatives(target: str) -> None:
    with Client(target) as client:
        prediction = client.chat(HELLO, temperature=0, max_gen_len=5, logprobs=True, top_logprobs=3)

    assert len(prediction.tokens) == prediction.usage.completion_tokens
    for token in prediction.tokens:
        assert len(token.top_logprobs) == 3
        assert (token.top_logprobs[0].id, token.top_logprobs[0].logprob) == (
            token.id,
            token.logprob,
        )


def test_token_ids_complete_like_their_text(target: str) -> None:
    with Client(target) as client:
        from_text = client.complete("Once", temperature=0, max_gen_len=5, echo=True, logprobs=True)
        prompt = [token.id for token in from_text.tokens[: from_text.usage.prompt_tokens]]
        from_ids = client.complete(prompt, temperature=0, max_gen_len=5, echo=True)

    assert from_ids.text == from_text.text


def test_the_model_says_what_its_defaults_and_limits_are(target: str) -> None:
    with Client(target) as client:
        model = client.get_model()
        answer = client.chat(HELLO, max_gen_len=1)

    assert (model.name, model.context_length, model.shards) == ("gqa-mp1", 256, 1)
    assert model.determinism is answer.determinism is Determinism.SEEDED
    assert model.sampling_defaults["temperature"] == 0.6
    assert model.limits.max_top_logprobs == 20


def test_the_length_limit_is_the_reason_given(target: str) -> None:
    with Client(target) as client:
        prediction = client.chat(HELLO, max_gen_len=1, ignore_eos=True)

    assert prediction.finish_reason is FinishReason.LENGTH
    assert prediction.usage.completion_tokens == 1


def test_the_gateway_names_every_broken_rule(target: str) -> None:
    with Client(target) as client, pytest.raises(InvalidRequestError) as caught:
        client.chat([{"role": "assistant", "content": "Hi"}], temperature=-1)

    fields = {violation.field for violation in caught.value.violations}
    assert "sampling.temperature" in fields
    assert any(field.startswith("dialogs[0].messages") for field in fields)
    assert caught.value.request_id


def test_leaving_a_stream_cancels_its_call(unfinished: Any) -> None:
    with Client(unfinished.target) as client:
        for _event in client.chat_stream(HELLO):
            break

        assert unfinished.cancelled.wait(timeout=10)
        assert unfinished.cancelled_names == unfinished.names != [""]


async def test_leaving_an_asyncio_stream_cancels_its_call(unfinished: Any) -> None:
    async with AsyncClient(unfinished.target) as client:
        async with aclosing(client.chat_stream(HELLO)) as stream:
            async for _event in stream:
                break

        assert await asyncio.to_thread(unfinished.cancelled.wait, 10)
        assert unfinished.cancelled_names == unfinished.names != [""]


async def test_a_cancelled_task_cancels_its_call(unfinished: Any) -> None:
    async with AsyncClient(unfinished.target) as client:
        stream = client.chat_stream(HELLO)
        await anext(stream)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.wait({waiting}, timeout=0)
        waiting.cancel()

        assert await asyncio.to_thread(unfinished.cancelled.wait, 10)
        await asyncio.wait({waiting})
        assert unfinished.cancelled_names == unfinished.names


def test_closing_a_client_cancels_its_streams(unfinished: Any) -> None:
    with Client(unfinished.target) as client:
        stream = client.chat_stream(HELLO)
        next(stream)

    assert unfinished.cancelled_names == unfinished.names


def test_without_resumption_streams_have_no_name(unfinished: Any) -> None:
    with Client(unfinished.target, resume_seconds=0) as client:
        for _event in client.chat_stream(HELLO):
            break

        assert unfinished.cancelled.wait(timeout=10)
    assert (unfinished.names, unfinished.cancelled_names) == ([""], [])


def test_a_stream_that_is_never_read_makes_no_call(unfinished: Any) -> None:
    with Client(unfinished.target) as client:
        client.chat_stream(HELLO).close()

    assert not unfinished.cancelled.is_set()


def test_a_proxy_is_not_asked_for_this_machine(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    with Client(target) as client:
        assert client.get_model().name == "gqa-mp1"
