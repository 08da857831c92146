"""Requests of 4 MiB that are refused, of every shape that once cost much more than their bytes.

`python -m tests.e2e.refusals GATEWAY TOKENIZER` sends 200 of them, eight at a time, and prints how
many ended with which status. A separate process, so that the sender delays no other client.
"""

import asyncio
import itertools
import json
import sys
from collections import Counter
from typing import Any

import grpc
from google.protobuf.message import Message

from llama.v1 import chat_pb2, sampling_pb2, tokenizer_pb2

SIZE = 4 * 1024 * 1024
CHAT, TOKENIZER = "/llama.v1.ChatService/", "/llama.v1.TokenizerService/"
COUNT, AT_ONCE = 200, 8


def field(kind: type[Message], name: str, payload: bytes | int) -> bytes:
    """A field by its name in the contract: a number, or bytes, a text or a message."""
    number = kind.DESCRIPTOR.fields_by_name[name].number
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def many(part: bytes) -> bytes:
    """As many of a part as make a request of the size, with room for what is around it."""
    return part * ((SIZE - 32) // len(part))


def message(role: int, content: bytes) -> bytes:
    parts = field(chat_pb2.Message, "role", role), field(chat_pb2.Message, "content", content)
    return field(chat_pb2.Dialog, "messages", b"".join(parts))


def biases() -> bytes:
    entry = sampling_pb2.SamplingParams.LogitBiasEntry
    entries = (
        field(sampling_pb2.SamplingParams, "logit_bias", field(entry, "key", token))
        for token in itertools.count()
    )
    return b"".join(itertools.islice(entries, SIZE // 8))


def shapes() -> list[tuple[str, bytes]]:
    """Methods with requests."""
    text, chat = chat_pb2.TextCompleteRequest, chat_pb2.ChatCompleteRequest
    render, sampling = chat_pb2.RenderPromptRequest, sampling_pb2.SamplingParams
    tokenize, score = chat_pb2.TokenizeRequest, chat_pb2.ScoreRequest
    joined = field(score, "candidates", b"a" * (SIZE // 64 - 1024)) * 64
    encode, decode = tokenizer_pb2.EncodeRequest, tokenizer_pb2.DecodeRequest
    drop = chat_pb2.CONTEXT_POLICY_DROP_OLDEST_TURNS
    user, assistant = chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT
    turns = (message(user, b"a") + message(assistant, b"b")) * 500 + message(user, b"a")
    long = message(chat_pb2.ROLE_SYSTEM, many(b"s")[16 * 1024 :])
    in_turns = field(chat, "dialogs", long + turns) + field(chat, "context_policy", drop)
    in_one = field(render, "dialog", long + message(user, b"a"))
    in_one += field(render, "context_policy", drop)
    ids, not_utf8 = field(sampling_pb2.TokenIds, "ids", 5), many(b"a")[:-1] + b"\xff"
    packed = field(sampling_pb2.TokenIds, "ids", many(b"\x05"))
    empty_dialog = field(chat, "dialogs", many(field(chat_pb2.Dialog, "messages", b"")))
    return [
        (CHAT + "TextComplete", field(text, "prompt_ids", packed)),
        (CHAT + "TextComplete", field(text, "prompt_ids", many(ids))),
        (CHAT + "TextComplete", field(text, "prompts", many(b"\0"))),
        (CHAT + "TextComplete", field(text, "prompts", many("🦙".encode()))),
        (CHAT + "TextComplete", field(text, "prompts", not_utf8)),
        (CHAT + "TextComplete", many(field(text, "prompts", b""))),
        (CHAT + "TextComplete", field(text, "model", many(b"a"))),
        (CHAT + "TextCompleteStream", many(field(text, "prompt_ids", b""))),
        (CHAT + "ChatComplete", many(field(chat, "dialogs", b""))),
        (CHAT + "ChatComplete", empty_dialog),
        (CHAT + "ChatComplete", field(chat, "dialogs", message(user, many(b"x")))),
        (CHAT + "ChatComplete", field(chat, "sampling", many(field(sampling, "stop", b"")))),
        (
            CHAT + "ChatComplete",
            field(chat, "sampling", field(sampling, "stop_token_ids", many(b"\x05"))),
        ),
        (CHAT + "ChatCompleteStream", field(chat, "sampling", biases())),
        (CHAT + "ChatComplete", in_turns),
        (CHAT + "RenderPrompt", in_one),
        (CHAT + "RenderPrompt", field(render, "dialog", message(user, many(b"[INST ")))),
        (CHAT + "Tokenize", field(tokenize, "texts", many(b"a"))),
        (CHAT + "Detokenize", field(chat_pb2.DetokenizeRequest, "sequences", packed)),
        (CHAT + "Score", field(score, "prompt", many(b"a"))),
        (CHAT + "Score", many(field(score, "candidates", b"")) + field(score, "prompt", b"a")),
        (CHAT + "Score", joined + field(score, "prompt", b"a" * 1500)),
        (CHAT + "GetModel", many(b"\xf8\x07\x00")),  # unknown fields
        (TOKENIZER + "Encode", many(field(encode, "segments", b""))),
        (TOKENIZER + "Decode", field(decode, "sequences", packed)),
        (
            TOKENIZER + "Encode",
            field(encode, "segments", field(tokenizer_pb2.Segment, "text", not_utf8)),
        ),
    ]


async def send(gateway: str, tokenizer: str) -> Counter[str]:
    """How many of them ended with which status."""
    ends: Counter[str] = Counter()
    requests = itertools.islice(itertools.cycle(shapes()), COUNT)
    async with (
        grpc.aio.insecure_channel(gateway) as to_gateway,
        grpc.aio.insecure_channel(tokenizer) as to_tokenizer,
    ):

        async def work() -> None:
            for method, request in requests:
                channel = to_gateway if method.startswith(CHAT) else to_tokenizer
                call: Any = channel.unary_stream(method)
                ends[(await call(request).code()).name] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())
    return ends


if __name__ == "__main__":
    print(json.dumps(asyncio.run(send(*sys.argv[1:]))))
