"""The synchronous and the asyncio client against real services."""

import asyncio
import math
import sys
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
    requests,
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

    assert texts(events, len(DIALOGS)) == [each.text for each in predictions]
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

        assert texts(chat_events, 1) == [chat.text]
        assert texts(text_events, 1) == [text.text]
        assert rendered.prompt_tokens == chat.usage.prompt_tokens
        assert (await asyncio_client.chat(HELLO, seed=1, max_gen_len=20)).text == chat.text
        assert (await asyncio_client.complete("Once", seed=1, max_gen_len=20)).text == text.text


async def test_both_clients_tokenize_and_score_alike(target: str) -> None:
    texts, candidates = ["Once", "naïve 🦙"], ["Grass.", "Stones and leaves."]
    with Client(target) as client:
        answer = client.chat(HELLO, temperature=0, max_gen_len=9, logprobs=True)
        tokenized = client.tokenize_many(texts, eos=True, tokens=True)
        scored = client.score(HELLO, candidates, top_logprobs=1)
        by_ids = client.score(
            client.tokenize(HELLO).ids, [[token.id for token in answer.tokens], [5]]
        )
    async with AsyncClient(target) as asyncio_client:
        assert await asyncio_client.tokenize_many(texts, eos=True, tokens=True) == tokenized
        back = await asyncio_client.detokenize_many([each.ids for each in tokenized])
        again = await asyncio_client.score(HELLO, candidates, top_logprobs=1)
        ids = (await asyncio_client.tokenize(HELLO)).ids
        assert ids == (await asyncio_client.render_prompt(HELLO)).ids
        assert (await asyncio_client.detokenize(ids)).text.startswith("[INST] Hello")

    assert [each.text for each in back] == texts
    assert [each.bytes for each in back] == [text.encode() for text in texts]
    assert tokenized[1].tokens[-1].offset == len(texts[1].encode())  # that of EOS
    assert [each.tokens for each in again] == [each.tokens for each in scored]
    assert [each.is_greedy for each in by_ids] == [True, False]
    for each in scored:
        assert each.logprob == pytest.approx(sum(token.logprob for token in each.tokens))
        assert each.perplexity == pytest.approx(math.exp(-each.logprob / len(each.tokens)))
        assert [len(token.top_logprobs) for token in each.tokens] == [1] * len(each.tokens)


@pytest.mark.parametrize(
    ("prompt", "candidates", "message"),
    [
        (7, ["a"], r"^prompt: must be a text, a dialog or a list of token ids, not 7$"),
        ("a", "b", r"^candidates: must be a list of candidates, not a text$"),
        ("a", ["b", 7], r"^candidates\[1\]: must be a text or a list of token ids, not 7$"),
        (
            [1, -1],
            [[1.5]],
            r"^prompt_ids.ids\[1\]: .*; candidate_ids\[0\].ids\[0\]: must",
        ),
        ([{"role": "me"}], ["a"], r"^dialog.messages\[0\].role: .*; dialog.messages\[0\].content"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_field(
    prompt: Any, candidates: Any, message: str
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match=message):
        client.score(prompt, candidates)


def test_what_cannot_be_tokenized_is_refused_with_the_field() -> None:
    wrong: Any = ["a", 7]
    with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequestError, match=r"^dialogs\[1\]: must be a list of messages"):
            client.tokenize_many(wrong)
        with pytest.raises(InvalidRequestError, match=r"^sequences\[1\]: must be a list of token"):
            client.detokenize_many([[1], wrong[1]])


def test_an_answer_continues_its_dialog(target: str) -> None:
    with Client(target) as client:
        prediction = client.chat(HELLO, temperature=0, max_gen_len=8)
        dialog = [*HELLO, prediction.message, *HELLO]
        rendered = client.render_prompt(dialog)

    assert prediction.text.strip() in rendered.segments[0]
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


def test_a_prompt_and_its_exact_continuation_are_what_echo_shows(target: str) -> None:
    options: requests.Sampling = {"temperature": 0, "max_gen_len": 20, "stop": "z"}
    with Client(target) as client:
        whole = client.complete("Llamas are", echo=True, **options)
        exact = client.complete("Llamas are", exact_continuation=True, **options)
        events = [*client.complete_stream("Llamas are", exact_continuation=True, **options)]
        plain = client.complete("Llamas are", **options)

    assert whole.text == "Llamas are" + exact.text
    assert texts(events, 1) == [exact.text]
    assert exact.text.removeprefix(" ") == plain.text  # Meta's, the default


@pytest.mark.parametrize("limit", [math.inf, 1e10, sys.maxsize])
async def test_no_time_limit_is_no_time_limit(target: str, limit: float) -> None:
    with Client(target, resume_seconds=math.inf) as client:
        assert client.get_model(timeout=limit).name == "gqa-mp1"
        assert client.chat(HELLO, max_gen_len=1, timeout=limit).usage.completion_tokens == 1
        assert [*client.chat_stream(HELLO, max_gen_len=1, timeout=limit)]
    async with AsyncClient(target, resume_seconds=math.inf) as asyncio_client:
        assert (await asyncio_client.get_status(timeout=limit)).serving
        await asyncio_client.complete("Once", max_gen_len=1, timeout=limit)
        stream = asyncio_client.complete_stream("Once", max_gen_len=1, timeout=limit)
        assert [event async for event in stream]


@pytest.mark.parametrize("resume_seconds", [math.nan, -1, True, "30"])
def test_what_is_no_bound_for_resuming_is_refused(resume_seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"^resume_seconds must be a number"):
        Client("127.0.0.1:1", resume_seconds=resume_seconds)


def test_priority_reaches_the_gateway(target: str) -> None:
    with Client(target) as client:
        assert client.chat(HELLO, max_gen_len=1, priority=-5).text is not None
        with pytest.raises(InvalidRequestError, match=r"^priority: must be -100 to 100, not 101$"):
            client.chat(HELLO, priority=101)
        with pytest.raises(InvalidRequestError, match=r"^priority: must be -100 to 100, not 101$"):
            list(client.complete_stream("Once", priority=101))


def test_the_model_says_what_its_defaults_and_limits_are(target: str) -> None:
    with Client(target) as client:
        model = client.get_model()
        answer = client.chat(HELLO, max_gen_len=1)

    assert (model.name, model.context_length, model.shards) == ("gqa-mp1", 256, 1)
    assert model.determinism is answer.determinism is not Determinism.UNSPECIFIED
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
