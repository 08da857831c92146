"""Arbitrary requests to every public method: whatever comes, the answer is a documented status.

Requests are made from the contract's descriptors, so that a new field is tried without a change
here. FUZZ_EXAMPLES asks for more than the few seconds' worth of the default.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama.v1 import chat_pb2, operator_pb2
from tests.e2e.deployments import Stack

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
# docs/api.md; DEADLINE_EXCEEDED and CANCELLED are a caller's doing, and so a fault here.
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
}
METHODS = [
    *chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods,
    *operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].methods,
    health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"],
]

# Where servers break: at the edges of types and of the contract's ranges.
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "[INST]", "<<SYS>>", "\0", "\ufeff", "\U0010ffff", "a" * 3000, "x" * 129]),
)
FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-38, math.inf, -math.inf, math.nan]),
)
WILD: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_FLOAT: FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: FLOATS,
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 5) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-2, 3) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-2, 3) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 20) | st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 20) | st.integers(0, 2**64 - 1),
}


# Values that most rules allow, so that requests get past the first check.
TAME: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([0.5, 1.0]),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 2),
    FieldDescriptor.CPPTYPE_INT32: st.just(0),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(1, 3),
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(["a", "llama", "x.y-z"]),
}


# Any: the stubs know two types of descriptors, and take one for the other.
def values(field: Any, *, tame: bool) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(GetMessageClass(field.message_type), tame=tame)
    if tame and field.cpp_type in TAME:
        likely = TAME[field.cpp_type]
        return st.integers(0, 15).flatmap(lambda n: likely if n else values(field, tame=False))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.binary(max_size=20) if field.type == FieldDescriptor.TYPE_BYTES else TEXTS
    return WILD[field.cpp_type]


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], *, tame: bool) -> Any:
    """A message with some of its fields set to anything that their types can hold."""
    message = kind()
    fields: list[Any] = list(kind.DESCRIPTOR.fields)
    for field in fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys, entries = (values(each, tame=tame) for each in field.message_type.fields)
            getattr(message, field.name).update(draw(st.dictionaries(keys, entries, max_size=2)))
        elif field.is_repeated:
            for value in draw(st.lists(values(field, tame=tame), max_size=3)):
                getattr(message, field.name).extend([value])
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(values(field, tame=tame)))
        else:
            setattr(message, field.name, draw(values(field, tame=tame)))
    return message


def dialog(*contents: str) -> chat_pb2.Dialog:
    roles = (chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT)
    turns = [
        chat_pb2.Message(role=roles[index % 2], content=text) for index, text in enumerate(contents)
    ]
    return chat_pb2.Dialog(messages=turns)


@st.composite
def nearly_valid(draw: st.DrawFn, kind: type[Message]) -> Any:
    """A request that gets far: its dialogs or prompts are fine, most else is."""
    message = draw(messages(kind, tame=True))
    names = kind.DESCRIPTOR.fields_by_name
    talk = dialog(*draw(st.lists(TEXTS, min_size=1, max_size=3)))
    if "dialogs" in names:
        del message.dialogs[:]
        message.dialogs.append(talk)
    if "dialog" in names:
        message.dialog.CopyFrom(talk)
    if "prompts" in names:
        del message.prompts[:], message.prompt_ids[:]
        message.prompts.append(draw(TEXTS))
    return message


def requests(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    kind = GetMessageClass(method.input_type)
    made = st.one_of(messages(kind, tame=False), nearly_valid(kind))
    # Without validation: strings of a message need not be UTF-8 on the wire.
    garbled = st.tuples(made, st.binary(max_size=8), st.integers(0, 64)).map(
        lambda parts: _spliced(parts[0].SerializeToString(), parts[1], parts[2])
    )
    whole = made.map(lambda message: message.SerializeToString())
    return st.one_of(whole, whole, garbled, st.binary(max_size=64))


def _spliced(serialized: bytes, extra: bytes, position: int) -> bytes:
    return serialized[:position] + extra + serialized[position + len(extra) :]


@pytest.fixture(scope="module")
def channel(stack: Stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.gateway.address) as to_gateway:
        yield to_gateway


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_arbitrary_requests_get_documented_statuses(
    channel: grpc.Channel, method: MethodDescriptor
) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = channel.unary_stream(path)

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
    @given(requests(method))
    @example(b"")
    @example(b"\x0a\x02\xc3\x28")  # a string, or a message, that is not UTF-8
    @example(b"\x0a" + b"\xff" * 9 + b"\x01")  # a length that overflows
    def check(request: bytes) -> None:
        assert outcome(call, request) in DOCUMENTED

    check()


def outcome(call: Any, request: bytes) -> grpc.StatusCode:
    stream = call(request, timeout=60)
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
