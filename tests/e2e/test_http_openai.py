"""The `openai` package as it is on PyPI, told nothing but the base URL, gets Meta's answers to the
golden cases, and the same refusals as clients of gRPC.
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.deployments import Stack
from tests.e2e.test_gateway_golden import CASE_IDS, read_cases

CASES = read_cases("mha")


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.gateway.http_url}/v1", api_key="none") as opened:
        yield opened


@pytest.fixture(scope="module")
def fields(client: openai.OpenAI) -> dict[str, Any]:
    """The fields of all requests."""
    [served] = client.models.list().data
    assert client.models.retrieve(served.id) == served
    return {"model": served.id, "temperature": 0, "top_p": 0.9}


@pytest.mark.parametrize("case_id", CASE_IDS["chat"])
def test_chat_answer_is_metas(client: openai.OpenAI, fields: Any, case_id: str) -> None:
    case = CASES[case_id]
    # Meta's None is the rest of the context, as an absent field is here.
    most = {} if case["args"]["max_gen_len"] is None else {"max_tokens": 32}
    asked = {**fields, **most, "messages": case["dialog"], "logprobs": True, "top_logprobs": 1}
    unary = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    [choice], streamed = unary.choices, [chunk.choices[0] for chunk in chunks]
    assert choice.message.content == case["content"]
    assert "".join(each.delta.content or "" for each in streamed) == case["content"]
    assert choice.finish_reason == streamed[-1].finish_reason
    assert {chunk.id for chunk in chunks} != {unary.id}
    if case_id.startswith("special_tag"):
        assert choice.finish_reason == "content_filter"
        return
    assert unary.usage is not None
    assert unary.usage.prompt_tokens == len(case["prompt_ids"])
    for tokens in (
        choice.logprobs.content,
        [t for each in streamed if each.logprobs for t in each.logprobs.content],
    ):
        assert [token.logprob for token in tokens] == pytest.approx(case["logprobs"], abs=1e-4)
        assert all(token.top_logprobs[0].logprob >= token.logprob - 1e-4 for token in tokens)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("case_id", CASE_IDS["text"])
def test_continued_text_is_metas(
    client: openai.OpenAI, fields: Any, case_id: str, as_ids: bool
) -> None:
    case = CASES[case_id]
    prompt = case["prompt_ids"] if as_ids else case["prompt"]
    asked = {**fields, "prompt": prompt, "max_tokens": 24, "logprobs": 0}
    asked["echo"] = case["args"]["echo"]
    unary = client.completions.create(**asked)
    chunks = [*client.completions.create(**asked, stream=True)]
    [choice], streamed = unary.choices, [chunk.choices[0] for chunk in chunks]
    # Without echo, Meta's code drops a space in front; with it, the text is exact.
    assert choice.text.removeprefix(" ") == case["content"].removeprefix(" ")
    assert "".join(each.text for each in streamed) == choice.text
    begins = case["args"]["echo"]  # with the token that nothing predicts
    logprobs = choice.logprobs
    joined = [x for each in streamed if each.logprobs for x in each.logprobs.token_logprobs]
    count = len(case["logprobs"])
    for told in (logprobs.token_logprobs, joined):
        assert (told[0] is None) is begins
        assert told[begins:count] == pytest.approx(case["logprobs"][begins:], abs=1e-4)
        assert len(told) == count + (choice.finish_reason == "stop")  # the end of sequence
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\ufffd" not in choice.text and offset:
            assert choice.text[offset : offset + len(token)] == token


@pytest.mark.parametrize("echo", [False, True])
def test_the_token_that_ends_an_answer_has_a_logprob_and_no_text(
    client: openai.OpenAI, fields: Any, echo: bool
) -> None:
    case = CASES["text_0"]
    asked = {**fields, "prompt": case["prompt_ids"], "max_tokens": 1, "logprobs": 1, "echo": echo}
    [free] = client.completions.create(**asked).choices
    stops = {"stop_token_ids": case["ids"][:1]}
    [ended] = client.completions.create(**asked, extra_body=stops).choices
    assert (free.finish_reason, ended.finish_reason) == ("length", "stop")
    assert free.text == ended.text + case["tokens"][0]
    # Programs that score a prompt cut off the last entry, whether the token is an end or not.
    for told in (free.logprobs, ended.logprobs):
        assert told.token_logprobs[-1] == pytest.approx(case["logprobs"][0], abs=1e-4)
    assert ended.logprobs == free.logprobs


def test_several_prompts_and_answers_come_in_the_order_of_the_prompts(
    client: openai.OpenAI, fields: Any
) -> None:
    prompts = ["The llama is", "1 2 3 4"]
    asked = {**fields, "temperature": 1, "seed": -7, "max_tokens": 4}
    both = client.completions.create(**asked, prompt=prompts, n=2).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    alone = [client.completions.create(**asked, prompt=each, n=2).choices for each in prompts]
    assert [choice.text for choice in both] == [c.text for each in alone for c in each]


def test_stop_and_penalties_and_bias_are_those_of_the_contract(
    client: openai.OpenAI, fields: Any
) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "What do llamas eat?"}]}]
    bias = client.chat.completions.create(
        **fields, messages=messages, max_tokens=3, logit_bias={"300": 100}, logprobs=True
    )
    [token, *_] = bias.choices[0].logprobs.content
    text = bias.choices[0].message.content
    stopped = client.chat.completions.create(
        **fields, messages=messages, logit_bias={"300": 100}, stop=token.token.strip() * 2
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert token.token.strip() * 2 in str(text)
    assert token.token.strip() * 2 not in str(stopped.choices[0].message.content)


def test_refusals_are_the_packages_exceptions(client: openai.OpenAI, fields: Any) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**{**fields, "temperature": 101}, messages=messages)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    assert wrong.value.request_id
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(**{**fields, "model": "other"}, messages=messages)
