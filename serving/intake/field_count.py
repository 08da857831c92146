"""Counts the fields of a serialized message before it is parsed.

The cost of parsing depends on the number of fields, not of bytes: 4 MiB of empty messages take
60 MB of memory and a tenth of a second of the event loop, 4 MiB of one text next to nothing. The
fields of a large message are therefore counted first, up to the allowed number, and the event loop
runs other tasks meanwhile. A number in a packed list costs much less: eight of them count as one
field.
"""

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serving.intake.time_slice import TimeSlice

# Wire types, the lowest three bits of a tag.
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_SIZE = {1: 8, 5: 4}
_GROUP = (3, 4)  # start and end

_MAX_VARINT_BYTES = 10
_NOT_LAST = bytes(range(128, 256))  # the bytes of a varint that another one follows
_NUMBERS_PER_FIELD = 8
_FIELDS_PER_CHECK = 2048  # fields from one look at the clock to the next


@dataclass(frozen=True, slots=True)
class _Layout:
    """The fields of a message type that contain others, by their tags."""

    messages: Mapping[int, "_Layout"]
    packed: frozenset[int]  # lists of numbers


async def has_more_fields_than(limit: int, serialized: bytes, descriptor: Descriptor) -> bool:
    """Whether a message of this type has more than `limit` fields, nested ones included."""
    if len(serialized) <= limit:
        return False
    time_slice = TimeSlice()
    for count in _counts(serialized, _layout(descriptor)):
        if count > limit:
            return True
        await time_slice.yield_if_over()
    return False


def _counts(data: bytes, layout: _Layout) -> Iterator[int]:
    """Yields the number of fields so far: every `_FIELDS_PER_CHECK` fields, and at the end.

    Stops early if the message is malformed, because the parser will report that.
    """
    count, position, next_check = 0, 0, _FIELDS_PER_CHECK
    open_messages = [(len(data), layout)]  # each with its end
    try:
        while open_messages:
            end, layout = open_messages[-1]
            if position >= end:
                open_messages.pop()
                continue
            tag, position = _varint(data, position)
            wire_type = tag & 7
            count += 1
            if wire_type == _LENGTH_DELIMITED:
                size, position = _varint(data, position)
                if size and tag in layout.messages:
                    open_messages.append((min(position + size, end), layout.messages[tag]))
                else:
                    if tag in layout.packed:
                        numbers = data[position : position + size].translate(None, _NOT_LAST)
                        count += len(numbers) // _NUMBERS_PER_FIELD
                    position += size
            elif wire_type == _VARINT:
                _, position = _varint(data, position)
            elif wire_type in _GROUP:
                # The contract has no groups. The parser skips one as a whole, but what is in it
                # would be counted here as fields, so no count would be right.
                yield sys.maxsize
                return
            else:
                position += _FIXED_SIZE[wire_type]
            if count >= next_check:
                next_check = count + _FIELDS_PER_CHECK
                yield count
    except LookupError:  # the data end within a field, a varint is too long, or no such wire type
        return
    yield count


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = data[position]
    if value < 128:
        return value, position + 1
    value &= 127
    for index in range(1, _MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    raise LookupError("a varint of more than 10 bytes")


@functools.cache
def _layout(descriptor: Descriptor) -> _Layout:
    """The layout of a message type; no type of the contract contains itself."""
    fields = descriptor.fields
    return _Layout(
        messages={
            field.number << 3 | _LENGTH_DELIMITED: _layout(field.message_type)
            for field in fields
            if field.message_type is not None
        },
        packed=frozenset(
            field.number << 3 | _LENGTH_DELIMITED
            for field in fields
            if field.is_repeated and field.cpp_type == FieldDescriptor.CPPTYPE_UINT32
        ),
    )
