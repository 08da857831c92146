"""Prompts from dialogs and texts, and which turns are dropped; with the real tokenizer."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.generation.events import SPECIAL_TAGS_REFUSAL, Refusal
from gateway.generation.safety.guard import dialogs_to_judge
from gateway.request.draft import Prompt
from gateway.request.prompts import encode_dialogs, encode_texts
from gateway.request.window import Window
from llama.prompt_format.dialog import ASSISTANT, USER, Message, Segment, drop_oldest_turns, render
from serving.errors import RequestError
from tokenizer_service.tokenizer import Tokenizer

TURN = [Message("user", "How fast is a runner?"), Message("assistant", "Fast.")]
SYSTEM = Message("system", "Answer in one line.")
LAST = Message("user", "And at night?")


class Encoder:
    """The tokenizer as the gateway calls it, with a count of the calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.calls = 0
        self.bytes = 0

    async def __call__(self, segments: Sequence[Segment]) -> list[list[int]]:
        self.calls += 1
        self.bytes += sum(len(each.text.encode()) for each in segments)
        return self.encode(segments)

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        return [self.tokenizer.encode(each.text, each.bos, each.eos) for each in segments]

    def prompt(self, dialog: Sequence[Message]) -> list[int]:
        return [token_id for ids in self.encode(render(dialog)) for token_id in ids]


def conversation(system: str | None, turns: Sequence[tuple[str, str]]) -> list[Message]:
    dialog = [] if system is None else [Message("system", system)]
    for user, assistant in turns:
        dialog += [Message("user", user), Message("assistant", assistant)]
    return [*dialog, LAST]


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)


async def test_all_dialogs_are_encoded_in_one_call(encoder: Encoder) -> None:
    dialogs = {"a": [LAST], "b": [SYSTEM, *TURN, LAST], "c": [*TURN, *TURN, LAST]}
    prompts = await encode_dialogs(dialogs, encoder, Window(1000), answer_room=0)
    assert [prompt.ids for prompt in prompts] == [encoder.prompt(d) for d in dialogs.values()]
    assert encoder.calls == 1


async def test_no_dialogs_are_no_call(encoder: Encoder) -> None:
    assert await encode_dialogs({}, encoder, Window(1000)) == []
    assert encoder.calls == 0


async def test_too_long_dialogs_are_all_named_with_both_numbers(encoder: Encoder) -> None:
    dialogs = {"dialogs[0]": [LAST], "dialogs[2]": [*TURN, LAST], "dialogs[3]": [*TURN, LAST]}
    with pytest.raises(RequestError) as refused:
        await encode_dialogs(dialogs, encoder, Window(40))
    count = len(encoder.prompt([*TURN, LAST]))
    assert [(each.field, each.description) for each in refused.value.violations] == [
        (path, f"the prompt has {count} tokens, the context length is 40")
        for path in ("dialogs[2]", "dialogs[3]")
    ]


@given(
    turns=st.lists(st.tuples(st.text("ab ", max_size=30), st.text("cd ", max_size=30)), max_size=6),
    system=st.none() | st.text("xy ", max_size=40),
    context_length=st.integers(20, 300),
    max_gen_len=st.integers(1, 400),
    bounded=st.booleans(),
)
async def test_as_few_of_the_oldest_turns_are_dropped_as_leave_room_for_an_answer(
    tokenizer: Tokenizer,
    turns: list[tuple[str, str]],
    system: str | None,
    context_length: int,
    max_gen_len: int,
    bounded: bool,
) -> None:
    encoder = Encoder(tokenizer)
    window = Window(context_length, tokenizer.max_token_bytes if bounded else None)
    room = window.answer_room(max_gen_len)
    assert room == min(max_gen_len, context_length // 4)
    dialog = conversation(system, turns)
    candidates = [
        encoder.prompt(drop_oldest_turns(dialog, count)) for count in range(len(turns) + 1)
    ]
    fits = (i for i, ids in enumerate(candidates) if len(ids) <= context_length - room)
    dropped = next(fits, len(turns))
    request = encode_dialogs({"d": dialog}, encoder, window, answer_room=room)
    if len(candidates[dropped]) > context_length:
        with pytest.raises(RequestError, match=f"the context length is {context_length}"):
            await request
        return
    [prompt] = await request
    assert (prompt.dropped_turns, prompt.ids) == (dropped, candidates[dropped])


@pytest.mark.parametrize("policy", [None, 10])
async def test_dialog_that_cannot_fit_is_refused_before_it_is_encoded(
    encoder: Encoder, policy: int | None
) -> None:
    dialog = [Message("system", "x" * 4000), *TURN * 20, LAST]
    with pytest.raises(RequestError, match=r"^d: the prompt has at least \d{3,} tokens, the con"):
        await encode_dialogs({"d": dialog}, encoder, Window(256, 8), answer_room=policy)
    assert encoder.calls == 0


async def test_text_that_cannot_fit_is_refused_before_it_is_encoded(encoder: Encoder) -> None:
    with pytest.raises(RequestError) as refused:
        await encode_texts({"prompts[0]": "a", "prompts[1]": "é" * 4000}, encoder, Window(256, 8))
    assert str(refused.value) == (
        "prompts[1]: the prompt has at least 1001 tokens, the context length is 256"
    )
    assert encoder.calls == 0


async def test_turns_that_cannot_fit_are_dropped_before_they_are_encoded(encoder: Encoder) -> None:
    dialog = [Message("user", "y" * 100_000), Message("assistant", "z" * 100_000), *TURN, LAST]
    [prompt] = await encode_dialogs({"d": dialog}, encoder, Window(256, 8), answer_room=64)
    assert prompt.ids == encoder.prompt([*TURN, LAST])
    assert (prompt.dropped_turns, encoder.calls) == (1, 1)
    assert encoder.bytes < 1000


async def test_system_message_is_encoded_a_few_times_however_many_turns_go(
    encoder: Encoder,
) -> None:
    dialog = [Message("system", "x" * 400), *TURN * 200, LAST]
    [prompt] = await encode_dialogs({"d": dialog}, encoder, Window(1000, 8), answer_room=250)
    assert 0 < prompt.dropped_turns < 200
    assert len(prompt.ids) <= 750
    assert encoder.calls <= 4


async def test_dropping_turns_without_a_system_message_costs_no_further_call(
    encoder: Encoder,
) -> None:
    dialog = [*TURN, *TURN, *TURN, LAST]
    length = len(encoder.prompt([*TURN, LAST]))
    [prompt] = await encode_dialogs({"d": dialog}, encoder, Window(length), answer_room=0)
    assert (prompt.dropped_turns, encoder.calls) == (2, 1)


async def test_texts_get_bos_and_no_eos(encoder: Encoder) -> None:
    [prompt] = await encode_texts({"prompts[0]": "one"}, encoder, Window(100))
    assert prompt.ids == encoder.tokenizer.encode("one", bos=True, eos=False)


def test_what_was_dropped_or_refused_is_not_held_to_be_judged() -> None:
    messages = [Message(USER, "a"), Message(ASSISTANT, "b"), Message(USER, "c")]
    prompts: list[Prompt | Refusal] = [
        Prompt([1], dropped_turns=1),
        SPECIAL_TAGS_REFUSAL,
        Prompt([1]),
    ]
    assert dialogs_to_judge(prompts, [messages] * 3) == [messages[2:], (), messages]
