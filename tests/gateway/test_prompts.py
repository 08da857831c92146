"""Prompts from dialogs and texts, and which turns are dropped; with the real tokenizer."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialog import Message, Segment, drop_oldest_turns, render
from gateway.prompts import encode_dialogs, encode_texts, take_ids
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

    async def __call__(self, segments: Sequence[Segment]) -> list[list[int]]:
        self.calls += 1
        return self.encode(segments)

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        return [self.tokenizer.encode(each.text, each.bos, each.eos) for each in segments]

    def prompt(self, dialog: Sequence[Message]) -> list[int]:
        return [token_id for ids in self.encode(render(dialog)) for token_id in ids]


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)


async def test_all_dialogs_are_encoded_in_one_call(encoder: Encoder) -> None:
    dialogs = {"a": [LAST], "b": [SYSTEM, *TURN, LAST], "c": [*TURN, *TURN, LAST]}
    prompts = await encode_dialogs(dialogs, encoder, 1000, drop_oldest_turns=True)
    assert [prompt.ids for prompt in prompts] == [encoder.prompt(d) for d in dialogs.values()]
    assert encoder.calls == 1


async def test_no_dialogs_are_no_call(encoder: Encoder) -> None:
    assert await encode_dialogs({}, encoder, 1000, drop_oldest_turns=False) == []
    assert encoder.calls == 0


async def test_too_long_dialogs_are_all_named_with_both_numbers(encoder: Encoder) -> None:
    dialogs = {"dialogs[0]": [LAST], "dialogs[2]": [*TURN, LAST], "dialogs[3]": [*TURN, LAST]}
    with pytest.raises(RequestError) as refused:
        await encode_dialogs(dialogs, encoder, 40, drop_oldest_turns=False)
    count = len(encoder.prompt([*TURN, LAST]))
    assert [(each.field, each.description) for each in refused.value.violations] == [
        (path, f"the prompt has {count} tokens, the context length is 40")
        for path in ("dialogs[2]", "dialogs[3]")
    ]


@given(
    turns=st.lists(st.tuples(st.text("ab ", max_size=30), st.text("cd ", max_size=30)), max_size=6),
    system=st.none() | st.text("xy ", max_size=40),
    context_length=st.integers(20, 300),
)
async def test_as_few_of_the_oldest_turns_are_dropped_as_needed(
    tokenizer: Tokenizer,
    turns: list[tuple[str, str]],
    system: str | None,
    context_length: int,
) -> None:
    encoder = Encoder(tokenizer)
    dialog = [] if system is None else [Message("system", system)]
    for user, assistant in turns:
        dialog += [Message("user", user), Message("assistant", assistant)]
    dialog.append(LAST)
    candidates = [
        encoder.prompt(drop_oldest_turns(dialog, count)) for count in range(len(turns) + 1)
    ]
    fitting = [count for count, ids in enumerate(candidates) if len(ids) <= context_length]
    request = encode_dialogs({"d": dialog}, encoder, context_length, drop_oldest_turns=True)
    if not fitting:
        with pytest.raises(RequestError, match=f"the context length is {context_length}"):
            await request
        return
    [prompt] = await request
    assert (prompt.dropped_turns, prompt.ids) == (fitting[0], candidates[fitting[0]])


async def test_dropping_turns_without_a_system_message_costs_no_further_call(
    encoder: Encoder,
) -> None:
    dialog = [*TURN, *TURN, *TURN, LAST]
    length = len(encoder.prompt([*TURN, LAST]))
    [prompt] = await encode_dialogs({"d": dialog}, encoder, length, drop_oldest_turns=True)
    assert (prompt.dropped_turns, encoder.calls) == (2, 1)


async def test_texts_get_bos_and_no_eos(encoder: Encoder) -> None:
    [prompt] = await encode_texts({"prompts[0]": "one"}, encoder, 100)
    assert prompt.ids == encoder.tokenizer.encode("one", bos=True, eos=False)


def test_ids_are_taken_as_they_are_up_to_the_context_length() -> None:
    [prompt] = take_ids({"prompt_ids[0]": [2, 1, 0]}, 3)
    assert prompt.ids == [2, 1, 0]
    with pytest.raises(RequestError, match=r"prompt_ids\[0\]: the prompt has 3 tokens"):
        take_ids({"prompt_ids[0]": [2, 1, 0]}, 2)
