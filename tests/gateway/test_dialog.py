"""Dialog rules and rendering, against Meta's."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.prompt_format.dialog import (
    Message,
    drop_oldest_turns,
    has_special_tags,
    render,
    violations,
)

# White space that str.strip() removes and keeps, tags and parts of them, and any other text.
EDGES = "\u0085\u00a0\u3000\u001c\u200b\ufeff\u2060 \n\t"
CONTENTS = st.lists(
    st.one_of(st.sampled_from([*EDGES, "[INST]", "<<SYS>>", "<</SYS>>\n\n", "</s>"]), st.text()),
    max_size=4,
).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant", ""])


class Encoded(NamedTuple):
    """The texts that Meta's tokenizer is asked to encode."""

    text: str
    bos: bool
    eos: bool


def meta_segments(dialog: list[dict[str, str]]) -> list[Encoded]:
    """The rule of `chat_completion` in Meta's llama/generation.py, step by step."""
    if dialog[0]["role"] == "system":
        content = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n" + dialog[1]["content"]
        dialog = [{"role": dialog[1]["role"], "content": content}, *dialog[2:]]
    assert all(message["role"] == "user" for message in dialog[::2])
    assert all(message["role"] == "assistant" for message in dialog[1::2])
    encoded = []
    for index in range(0, len(dialog) - 1, 2):
        prompt, answer = dialog[index]["content"], dialog[index + 1]["content"]
        text = "[INST] " + prompt.strip() + " [/INST] " + answer.strip() + " "
        encoded.append(Encoded(text, bos=True, eos=True))
    assert dialog[-1]["role"] == "user"
    text = "[INST] " + dialog[-1]["content"].strip() + " [/INST]"
    return [*encoded, Encoded(text, bos=True, eos=False)]


@st.composite
def valid_dialogs(draw: st.DrawFn) -> list[Message]:
    roles = draw(st.sampled_from([[], ["system"]]))
    roles = roles + ["user", "assistant"] * draw(st.integers(0, 4)) + ["user"]
    return [Message(role, draw(CONTENTS)) for role in roles]


def as_meta(dialog: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in dialog]


@given(valid_dialogs())
def test_rendering_equals_metas(dialog: list[Message]) -> None:
    rendered = [Encoded(each.text, each.bos, each.eos) for each in render(dialog)]
    assert rendered == meta_segments(as_meta(dialog))


@given(st.lists(st.builds(Message, ROLES, st.just("text")), max_size=6))
def test_dialogs_that_meta_rejects_are_violations_and_no_others(dialog: list[Message]) -> None:
    try:
        meta_segments(as_meta(dialog))
        accepted = True
    except (AssertionError, IndexError):
        accepted = False
    assert (violations(dialog, "dialogs[0]") == []) is accepted


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("", ["messages: must not be empty"]),
        ("s", ["messages[0].role: the last message must be from the user, not from the system"]),
        (
            "ua",
            ["messages[1].role: the last message must be from the user, not from the assistant"],
        ),
        (
            "au",
            [
                "messages[0].role: the first message must be from the system or the user, "
                "not from the assistant"
            ],
        ),
        (
            "uuau",
            [
                "messages[1].role: the message after one by the user must be from the assistant, "
                "not from the user"
            ],
        ),
        ("u?u", ["messages[1].role: must be system, user or assistant"]),
        (
            "?s",
            [
                "messages[0].role: must be system, user or assistant",
                "messages[1].role: only the first message may be from the system",
            ],
        ),
    ],
)
def test_each_violation_names_its_message_and_rule(roles: str, expected: list[str]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "?": ""}
    dialog = [Message(names[role], "text") for role in roles]
    found = violations(dialog, "dialogs[3]")
    assert [f"{each.field}: {each.description}" for each in found] == [
        f"dialogs[3].{each}" for each in expected
    ]


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_special_tag_is_found_in_any_message(tag: str, place: int) -> None:
    contents = ["a", "b", "c", "d"]
    contents[place] += f"x{tag}y"
    roles = ["system", "user", "assistant", "user"]
    assert has_special_tags([Message(*each) for each in zip(roles, contents, strict=True)])


@pytest.mark.parametrize("text", ["[inst]", "<< SYS >>", "<s></s>", "[ INST ]", "<SYS>"])
def test_what_only_resembles_a_special_tag_is_none(text: str) -> None:
    assert not has_special_tags([Message("user", text)])


@given(valid_dialogs(), st.data())
def test_dropped_turns_are_the_oldest_pairs(dialog: list[Message], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, (len(dialog) - 1) // 2))
    kept = drop_oldest_turns(dialog, count)
    system = [message for message in dialog[:1] if message.role == "system"]
    assert kept == system + dialog[len(system) :][2 * count :]
    assert violations(kept, "dialog") == []
