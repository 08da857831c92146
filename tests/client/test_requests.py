"""What the clients' arguments become on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import InvalidRequestError, Message, requests
from llama.v1 import chat_pb2

valid_text = st.text(st.characters(exclude_categories=["Cs"]))
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": valid_text}
)
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


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
    ("options", "field"),
    [
        ({"seed": -1}, "sampling.seed"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"top_k": 1.5}, "sampling.top_k"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"stop": ["fine", "\ud800"]}, "sampling.stop[1]"),
        ({"stop_token_ids": [7, -1]}, "sampling.stop_token_ids[1]"),
        ({"logit_bias": {-1: 0.5}}, "sampling.logit_bias"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"context_policy": "guess"}, "context_policy"),
    ],
)
def test_an_option_that_cannot_be_sent_is_named(options: requests.ChatOptions, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requests.chat(chat_pb2.ChatCompleteRequest, [HELLO], options)

    assert [violation.field for violation in caught.value.violations] == [field]


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
            "cannot be sent ('model' is none of system, user, assistant)",
        ),
        (
            "dialog.messages[1].content",
            "has the wrong type (bad argument type for built-in operation)",
        ),
    ]


def test_a_dialog_where_dialogs_belong_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"dialogs\[0\]\.messages\[0\]\.role"):
        requests.chat(chat_pb2.ChatCompleteRequest, [[HELLO]], {})  # type: ignore[list-item]
