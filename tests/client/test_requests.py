"""The clients' arguments on the wire."""

import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import InvalidRequestError, Message, Violation, requests
from llama.v1 import chat_pb2

valid_text = st.text(st.characters(exclude_categories=["Cs"]))
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": valid_text}
)
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]
A_MESSAGE = 'a message such as {"role": "user", "content": "…"}'
A_LIST = 'a list of messages such as {"role": "user", "content": "…"}'


@given(st.lists(st.lists(messages)))
def test_dialogs_arrive_as_they_are(dialogs: list[list[Message]]) -> None:
    request = requests.chat(chat_pb2.ChatCompleteRequest, dialogs, {})

    arrived = chat_pb2.ChatCompleteRequest.FromString(request.SerializeToString())
    assert [
        [
            {"role": chat_pb2.Role.Name(each.role)[5:].lower(), "content": each.content}
            for each in dialog.messages
        ]
        for dialog in arrived.dialogs
    ] == dialogs


def test_unary_and_streaming_requests_are_the_same() -> None:
    options: requests.ChatOptions = {"temperature": 0.5, "seed": 7, "logprobs": True}

    unary = requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], options)
    streaming = requests.chat(chat_pb2.ChatCompleteStreamRequest, [HELLO], options)

    assert unary.SerializeToString() == streaming.SerializeToString()


def test_absent_and_none_options_are_left_to_the_server() -> None:
    request = requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], {"temperature": None})

    assert not request.HasField("sampling")


def test_zero_is_sent_and_not_taken_for_absent() -> None:
    request = requests.chat(
        chat_pb2.ChatCompleteRequest, [HELLO], {"temperature": 0, "seed": 0, "ignore_eos": False}
    )

    assert {field.name for field, _ in request.sampling.ListFields()} == {
        "temperature",
        "seed",
        "ignore_eos",
    }


def test_every_sampling_option_reaches_its_field() -> None:
    sampling: requests.TextOptions = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "max_gen_len": 4,
        "min_gen_len": 2,
        "seed": 5,
        "stop": ["\n", "END"],
        "stop_token_ids": [7, 8],
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "ignore_eos": True,
        "logit_bias": {7: -1.0},
    }

    request = requests.text(chat_pb2.TextCompleteRequest, ["Once"], sampling)

    sent = {field.name: value for field, value in request.sampling.ListFields()}
    assert sent == sampling


def test_the_model_and_the_token_ids_to_score_are_sent() -> None:
    options: requests.ChatOptions = {
        "model": "llama",
        "logprobs": True,
        "logprob_token_ids": [9, 7],
    }
    request = requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], options)
    assert (request.model, list(request.logprob_token_ids)) == ("llama", [9, 7])
    with pytest.raises(InvalidRequestError, match=r"logprob_token_ids\[1\]: must be an integer"):
        requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], {"logprob_token_ids": [1, "a"]})  # type: ignore[list-item]


def test_n_is_sent_where_it_is_given() -> None:
    chat = requests.chat(chat_pb2.ChatCompleteStreamRequest, [HELLO], {}, n=3)
    text = requests.text(chat_pb2.TextCompleteRequest, ["Once"], {}, n=0)
    plain = requests.text(chat_pb2.TextCompleteRequest, ["Once"], {})

    assert (chat.n, text.n) == (3, 0)
    assert text.HasField("n")
    assert not plain.HasField("n")


def test_room_for_the_answer_is_asked_for_when_a_prompt_is_rendered() -> None:
    dialog: list[Message] = [{"role": "user", "content": "Hi"}]
    assert requests.render_prompt(dialog, {"max_gen_len": 7}).max_gen_len == 7
    assert not requests.render_prompt(dialog, {"max_gen_len": None}).HasField("max_gen_len")


def test_an_n_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], {}, n=-1)

    assert [violation.field for violation in caught.value.violations] == ["n"]


def test_prompts_may_be_texts_or_token_ids() -> None:
    texts = requests.text(chat_pb2.TextCompleteRequest, ["a", ""], {})
    ids = requests.text(chat_pb2.TextCompleteRequest, [[1, 2], [3]], {})

    assert list(texts.prompts) == ["a", ""]
    assert [list(each.ids) for each in ids.prompt_ids] == [[1, 2], [3]]


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unknown option temprature"):
        requests.chat(
            chat_pb2.ChatCompleteRequest,
            [HELLO],
            {"temprature": 0.5},  # type: ignore[typeddict-unknown-key]
        )


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"seed": -1}, "sampling.seed", "must be 0 to 18446744073709551615, not -1"),
        ({"seed": True}, "sampling.seed", "must be an integer, not True"),
        ({"top_k": 1.5}, "sampling.top_k", "must be an integer, not 1.5"),
        ({"priority": 2**31}, "priority", "must be -2147483648 to 2147483647, not 2147483648"),
        ({"temperature": "hot"}, "sampling.temperature", "must be a number, not a text"),
        ({"temperature": True}, "sampling.temperature", "must be a number, not True"),
        ({"ignore_eos": 5}, "sampling.ignore_eos", "must be True or False, not 5"),
        ({"logprobs": 5}, "logprobs", "must be True or False, not 5"),
        ({"logprobs": [1]}, "logprobs", "must be True or False, not a list"),
        ({"stop": b"x"}, "sampling.stop", "must be a text or a list of texts, not bytes"),
        ({"stop": 7}, "sampling.stop", "must be a text or a list of texts, not 7"),
        ({"stop": ["a", b"b"]}, "sampling.stop[1]", "must be a text, not bytes"),
        (
            {"stop_token_ids": b"x"},
            *("sampling.stop_token_ids", "must be a list of token ids, not bytes"),
        ),
        (
            {"stop": ["fine", "\ud800"]},
            "sampling.stop[1]",
            "holds a lone surrogate (U+D800 at character 0), which is not valid unicode",
        ),
        ({"stop_token_ids": 13}, "sampling.stop_token_ids", "must be a list of token ids, not 13"),
        (
            {"stop_token_ids": [7, -1]},
            "sampling.stop_token_ids[1]",
            "must be 0 to 4294967295, not -1",
        ),
        ({"stop_token_ids": [True]}, "sampling.stop_token_ids[0]", "must be an integer, not True"),
        ({"logit_bias": {-1: 0.5}}, "sampling.logit_bias[-1]", "must be 0 to 4294967295, not -1"),
        ({"logit_bias": {"7": 0.5}}, "sampling.logit_bias[7]", "must be an integer, not a text"),
        (
            {"logit_bias": [(7, 1)]},
            *("sampling.logit_bias", "must be a dictionary of token ids and numbers, not a list"),
        ),
        ({"top_logprobs": -1}, "top_logprobs", "must be 0 to 4294967295, not -1"),
        (
            {"context_policy": "guess"},
            *("context_policy", "must be reject or drop_oldest_turns, not 'guess'"),
        ),
        ({"timeout": float("nan")}, "timeout", "must be a number of seconds, 0 or more, not nan"),
        ({"timeout": -1}, "timeout", "must be a number of seconds, 0 or more, not -1"),
        ({"timeout": "5"}, "timeout", "must be a number, not a text"),
    ],
)
def test_an_option_that_cannot_be_sent_is_named(
    options: requests.ChatOptions, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], options)

    assert caught.value.violations == (Violation(field, problem),)


@pytest.mark.parametrize(
    ("dialogs", "field", "problem"),
    [
        ("hi", "dialogs", "must be a list of dialogs, not a text"),
        (["hi"], "dialogs[0]", f"must be {A_LIST}, not a text"),
        (HELLO, "dialogs[0]", f"must be {A_LIST}, not a dictionary"),
        ([None], "dialogs[0]", f"must be {A_LIST}, not None"),
        ([["hi"]], "dialogs[0].messages[0]", f"must be {A_MESSAGE}, not a text"),
        ([[HELLO]], "dialogs[0].messages[0]", f"must be {A_MESSAGE}, not a list"),
        (
            [[{"role": "user", "content": b"Hi"}]],
            *("dialogs[0].messages[0].content", "must be a text, not bytes"),
        ),
        (
            [[{"role": "user", "content": [{"type": "text"}]}]],
            *("dialogs[0].messages[0].content", "must be a text, not a list"),
        ),
        (
            [[{"role": ["user"], "content": "Hi"}]],
            *("dialogs[0].messages[0].role", "must be system, user or assistant, not a list"),
        ),
    ],
)
def test_what_is_no_dialog_is_named(dialogs: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requests.chat(chat_pb2.ChatCompleteStreamRequest, dialogs, {})

    assert caught.value.violations == (Violation(field, problem),)


@pytest.mark.parametrize(
    ("prompts", "field", "problem"),
    [
        ("Once", "prompts", "must be a list of prompts, not a text"),
        ([b"Once"], "prompts[0]", "must be a text or a list of token ids, not bytes"),
        ([None], "prompts[0]", "must be a text or a list of token ids, not None"),
        ([1, 2], "prompts[0]", "must be a text or a list of token ids, not 1"),
        (
            [{1, 2}],
            *("prompts[0]", "must be a text or a list of token ids, not a set, which has no order"),
        ),
        ([["Once"]], "prompt_ids[0].ids[0]", "must be an integer, not a text"),
        ([[1, 2.0]], "prompt_ids[0].ids[1]", "must be an integer, not 2.0"),
        ([[1, False]], "prompt_ids[0].ids[1]", "must be an integer, not False"),
    ],
)
def test_what_is_no_prompt_is_named(prompts: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requests.text(chat_pb2.TextCompleteRequest, prompts, {})

    assert caught.value.violations[0] == Violation(field, problem)


def test_one_text_is_one_stop_string() -> None:
    request = requests.text(chat_pb2.TextCompleteRequest, ["Once"], {"stop": "hay"})

    assert list(request.sampling.stop) == ["hay"]


def test_generators_and_numpy_values_are_taken_as_lists_and_numbers() -> None:
    options: Any = {
        "stop": (each for each in ("a", "b")),
        "stop_token_ids": np.array([7, 8]),
        "seed": np.uint64(2**64 - 1),
        "temperature": np.float32(0.5),
        "ignore_eos": np.True_,
    }

    prompt: Any = np.array([1, 2])
    request = requests.text(chat_pb2.TextCompleteRequest, [prompt], options)

    assert list(request.prompt_ids[0].ids) == [1, 2]
    sent = {field.name: value for field, value in request.sampling.ListFields()}
    assert sent == {
        "stop": ["a", "b"],
        "stop_token_ids": [7, 8],
        "seed": 2**64 - 1,
        "temperature": 0.5,
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    "timeout", [None, math.inf, 1e10, sys.maxsize, pytest.param(10**400, id="large")]
)
def test_no_limit_is_no_deadline(timeout: float | None) -> None:
    assert requests.deadline({"timeout": timeout}) is None


def test_a_lone_surrogate_is_named_with_its_place() -> None:
    dialog: list[Message] = [*HELLO, {"role": "assistant", "content": "ab\ud800"}]

    with pytest.raises(InvalidRequestError) as caught:
        requests.chat(chat_pb2.ChatCompleteRequest, [HELLO, dialog], {})

    assert str(caught.value) == (
        "dialogs[1].messages[1].content: "
        "holds a lone surrogate (U+D800 at character 2), which is not valid unicode"
    )


def test_all_that_cannot_be_sent_is_reported_at_once() -> None:
    dialog = [{"role": "model", "content": "Hi"}, {"role": "user"}]

    with pytest.raises(InvalidRequestError) as caught:
        requests.render_prompt(dialog, {})  # type: ignore[arg-type]

    assert [(each.field, each.description) for each in caught.value.violations] == [
        (
            "dialog.messages[0].role",
            "must be system, user or assistant, not 'model'",
        ),
        (
            "dialog.messages[1].content",
            "must be a text, not None",
        ),
    ]
