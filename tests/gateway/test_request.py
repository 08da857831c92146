"""Every field of a request against the range that the contract documents."""

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.options import RequestLimits, options
from gateway.request.read_dialogs import read_dialogs
from gateway.request.validation import chat_violations, text_violations
from gateway.request.window import Window
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_USER,
    ChatCompleteRequest,
    ContextPolicy,
    Dialog,
    Message,
    TextCompleteRequest,
)
from llama.v1.sampling_pb2 import SamplingParams, TokenIds

LIMITS = RequestLimits(max_dialogs=3, max_messages=5, max_choices=4, max_sequences=8)
VOCAB_SIZE = 560
WINDOW = Window(256)

QUESTION = Dialog(messages=[Message(role=ROLE_USER, content="?")])

RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


def chat(**fields: Any) -> ChatCompleteRequest:
    return ChatCompleteRequest(**{"dialogs": [QUESTION], **fields})


def sampling(**fields: Any) -> ChatCompleteRequest:
    return chat(sampling=SamplingParams(**fields))


def text(**fields: Any) -> TextCompleteRequest:
    return TextCompleteRequest(**fields)


async def test_others_run_while_thousands_of_messages_are_read() -> None:
    limits = RequestLimits(max_dialogs=64, max_messages=1024, max_choices=1, max_sequences=64)
    roles = (ROLE_USER, ROLE_ASSISTANT)
    talk = [Message(role=roles[index % 2], content="?") for index in range(1023)]
    reading = asyncio.create_task(read_dialogs([Dialog(messages=talk)] * 64, limits))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len((await reading).messages) == 64
    assert turns > 5


async def test_dialogs_are_read_until_enough_violations_are_found() -> None:
    wrong = Dialog(messages=[Message(content="?")] * 5)
    found = (await read_dialogs([wrong] * 3, LIMITS)).violations
    assert [each.field for each in found][-1] == "dialogs[1].messages[4].role"


def told(request: ChatCompleteRequest | TextCompleteRequest) -> list[str]:
    if isinstance(request, ChatCompleteRequest):
        dialogs = asyncio.run(read_dialogs(request.dialogs, LIMITS))
        found = chat_violations(request, dialogs.violations, LIMITS, VOCAB_SIZE)
    else:
        found = text_violations(request, LIMITS, VOCAB_SIZE, WINDOW)
    return [f"{each.field}: {each.description}" for each in found]


@pytest.mark.parametrize(
    ("request_", "violation"),
    [
        (chat(dialogs=[]), "dialogs: must not be empty"),
        (chat(dialogs=[QUESTION] * 4), "dialogs: must hold at most 3 entries, not 4"),
        (chat(dialogs=[QUESTION, Dialog()]), "dialogs[1].messages: must not be empty"),
        (
            chat(dialogs=[Dialog(messages=[Message()] * 6)]),
            "dialogs[0].messages: must hold at most 5 entries, not 6",
        ),
        (
            chat(dialogs=[Dialog(messages=[Message(content="?")])]),
            "dialogs[0].messages[0].role: must be system, user or assistant",
        ),
        (chat(top_logprobs=5), "top_logprobs: needs logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs: must be 0 to 20, not 21"),
        (chat(context_policy=9), "context_policy: must be a value of ContextPolicy, not 9"),
        (
            sampling(top_k=0),
            "sampling.top_k: must be at least 1, not 0; leave it out to keep all tokens",
        ),
        (
            sampling(repetition_penalty=0),
            "sampling.repetition_penalty: must be above 0 and at most 10, not 0",
        ),
        (sampling(stop=["x"] * 17), "sampling.stop: must hold at most 16 entries, not 17"),
        (sampling(stop=["a", ""]), "sampling.stop[1]: must have 1 to 256 characters, not 0"),
        (sampling(stop=["é" * 257]), "sampling.stop[0]: must have 1 to 256 characters, not 257"),
        (
            sampling(stop_token_ids=[1, 2, 559, 560]),
            "sampling.stop_token_ids[3]: must be less than the vocabulary size, 560, not 560",
        ),
        (
            sampling(stop_token_ids=[7] * 65),
            "sampling.stop_token_ids: must hold at most 64 entries, not 65",
        ),
        (
            sampling(logit_bias={560: 1}),
            "sampling.logit_bias[560]: must be less than the vocabulary size, 560, not 560",
        ),
        (sampling(logit_bias={7: 101}), "sampling.logit_bias[7]: must be -100 to 100, not 101"),
        (
            sampling(logit_bias={7: math.nan}),
            "sampling.logit_bias[7]: must be -100 to 100, not nan",
        ),
        (
            sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
            "sampling.logit_bias: must hold at most 1024 entries, not 1025",
        ),
        (text(), "prompts: must not be empty"),
        (text(prompts=["a"] * 4), "prompts: must hold at most 3 entries, not 4"),
        (
            text(prompts=["a"], prompt_ids=[TokenIds(ids=[1])]),
            "prompt_ids: cannot be given together with prompts",
        ),
        (text(prompt_ids=[TokenIds()] * 4), "prompt_ids: must hold at most 3 entries, not 4"),
        (
            text(prompt_ids=[TokenIds(ids=[1]), TokenIds()]),
            "prompt_ids[1].ids: must not be empty",
        ),
        (
            text(prompt_ids=[TokenIds(ids=[1, 559, 560, 561])]),
            "prompt_ids[0].ids[2]: must be less than the vocabulary size, 560, not 560",
        ),
        (text(prompts=["a"], top_logprobs=1), "top_logprobs: needs logprobs"),
        (chat(n=0), "n: must be 1 to 4, not 0"),
        (text(prompts=["a"], n=5), "n: must be 1 to 4, not 5"),
        (
            chat(dialogs=[QUESTION] * 3, n=3),
            "n: times the 3 dialogs or prompts must be at most 8, not 9",
        ),
        (
            text(prompt_ids=[TokenIds(ids=[1])] * 3, n=4),
            "n: times the 3 dialogs or prompts must be at most 8, not 12",
        ),
    ],
)
def test_each_broken_rule_is_one_violation_with_its_path(
    request_: ChatCompleteRequest | TextCompleteRequest, violation: str
) -> None:
    assert told(request_) == [violation]


def test_all_violations_are_told_at_once() -> None:
    request = chat(
        dialogs=[Dialog(), QUESTION],
        sampling=SamplingParams(temperature=-1, top_p=math.inf, stop=[""]),
        top_logprobs=30,
    )
    assert [each.split(":")[0] for each in told(request)] == [
        "dialogs[0].messages",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.stop[0]",
        "top_logprobs",
    ]


@pytest.mark.parametrize("name", RANGES)
@given(value=st.floats(width=32) | st.floats(-3, 101, width=32))
def test_numbers_outside_their_range_and_nan_are_violations(name: str, value: float) -> None:
    low, high = RANGES[name]
    inside = math.isfinite(value) and low <= value <= high
    assert bool(told(sampling(**{name: value}))) is not inside


@pytest.mark.parametrize("policy", ContextPolicy.values())
def test_every_named_context_policy_is_accepted(policy: int) -> None:
    assert told(chat(context_policy=policy)) == []


def test_limits_themselves_are_accepted() -> None:
    extreme = SamplingParams(
        temperature=100,
        top_p=0,
        min_p=1,
        top_k=1,
        max_gen_len=0,
        seed=2**64 - 1,
        stop=["x" * 256] * 16,
        stop_token_ids=[VOCAB_SIZE - 1] * 64,
        repetition_penalty=10,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={VOCAB_SIZE - 1: -100},
    )
    assert told(chat(sampling=extreme, logprobs=True, top_logprobs=20, n=4)) == []
    assert told(text(prompts=["a"] * 2, n=4)) == []


def test_absent_fields_take_the_documented_defaults() -> None:
    chosen = options(sampling(top_p=0.5), context_length=256)
    assert chosen.sampling == SamplingParams(
        temperature=0.6,
        top_p=0.5,
        min_p=0,
        max_gen_len=255,
        repetition_penalty=1,
        presence_penalty=0,
        frequency_penalty=0,
        ignore_eos=False,
        min_gen_len=0,
    )


def test_stop_strings_stay_at_the_gateway_and_stop_tokens_go_on() -> None:
    chosen = options(sampling(stop=["a", "b"], stop_token_ids=[7, 8]), context_length=256)
    assert [stop.text for stop in chosen.stop] == ["a", "b"]
    assert not chosen.sampling.stop
    assert list(chosen.sampling.stop_token_ids) == [7, 8]
