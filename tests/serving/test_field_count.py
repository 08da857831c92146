"""The fields of a serialized message, counted without parsing it."""

import asyncio
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from hypothesis import given
from hypothesis import strategies as st

from llama.v1.chat_pb2 import (
    ChatCompleteRequest,
    Dialog,
    Message,
    RenderPromptRequest,
    TextCompleteRequest,
)
from llama.v1.sampling_pb2 import SamplingParams, TokenIds
from serving.intake.field_count import has_more_fields_than

TEXTS = st.text(max_size=5)
DIALOGS = st.lists(
    st.builds(
        Dialog,
        messages=st.lists(st.builds(Message, role=st.integers(0, 300), content=TEXTS), max_size=4),
    ),
    max_size=4,
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(TEXTS, max_size=4),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=30),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(0, 1), max_size=4),
)
PROMPT_IDS = st.lists(
    st.builds(TokenIds, ids=st.lists(st.integers(0, 40_000), max_size=40)), max_size=4
)
REQUESTS = st.builds(ChatCompleteRequest, dialogs=DIALOGS, sampling=SAMPLING, n=st.integers(0, 3))
TEXT_REQUESTS = st.builds(TextCompleteRequest, prompt_ids=PROMPT_IDS, prompts=st.lists(TEXTS))


def fields(message: ProtoMessage) -> int:
    """The same by way of the parsed message."""
    count = 0
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            count += sum(3 for _ in value)  # the entry, its key and its value
        elif field.message_type is not None:
            each: Any = value if field.is_repeated else [value]
            count += sum(1 + fields(inner) for inner in each)
        elif field.is_repeated and field.name in ("ids", "stop_token_ids"):
            count += 1 + len(value) // 8
        else:
            count += len(value) if field.is_repeated else 1
    return count


@given(message=REQUESTS | TEXT_REQUESTS)
async def test_fields_are_counted_as_a_parser_finds_them(message: ProtoMessage) -> None:
    count, serialized = fields(message), message.SerializeToString()
    descriptor: Any = message.DESCRIPTOR
    assert not await has_more_fields_than(count, serialized, descriptor)
    if count:
        assert await has_more_fields_than(count - 1, serialized, descriptor)


@given(serialized=st.binary(max_size=200), limit=st.integers(0, 20))
async def test_malformed_message_is_left_to_the_parser(serialized: bytes, limit: int) -> None:
    assert isinstance(
        await has_more_fields_than(limit, serialized, ChatCompleteRequest.DESCRIPTOR), bool
    )


@pytest.mark.parametrize(
    "part",
    [
        ChatCompleteRequest(dialogs=[Dialog()]),
        RenderPromptRequest(dialog=Dialog(messages=[Message()])),
    ],
)
async def test_others_run_while_a_large_message_is_counted(part: ProtoMessage) -> None:
    serialized = part.SerializeToString() * 1_000_000
    descriptor: Any = part.DESCRIPTOR
    counting = asyncio.create_task(has_more_fields_than(900_000, serialized, descriptor))
    turns = 0
    while not counting.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10


@pytest.mark.parametrize("group", [b"\x7b", b"\x7c"])  # begin and end of field 15
async def test_a_group_is_more_than_any_number_of_fields(group: bytes) -> None:
    # In it, the parser takes for content what looks like fields here.
    hidden = b"\x0a\xff\xff\xff\x0f" + b"\x0a\x00" * 100
    assert await has_more_fields_than(100, group + hidden, ChatCompleteRequest.DESCRIPTOR)


class Read(bytes):
    """Bytes that count how many of them were looked at one by one."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("before", [b"", b"\x10", b"\x0a"])  # as a tag, a number and a length
async def test_endless_varint_costs_ten_bytes_and_is_left_to_the_parser(before: bytes) -> None:
    serialized = Read(before + b"\xff" * 1_000_000 + b"\x01")
    assert not await has_more_fields_than(100, serialized, ChatCompleteRequest.DESCRIPTOR)
    assert serialized.looks <= len(before) + 10
    with pytest.raises(DecodeError):
        ChatCompleteRequest.FromString(bytes(serialized))


async def test_longest_varint_is_read_to_its_end() -> None:
    longest = b"\x10" + b"\xff" * 9 + b"\x01"
    two = longest + b"\x10\x01"
    assert await has_more_fields_than(1, two, ChatCompleteRequest.DESCRIPTOR)
    assert not await has_more_fields_than(2, two, ChatCompleteRequest.DESCRIPTOR)
