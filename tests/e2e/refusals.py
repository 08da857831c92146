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

SIZE = 4 * 1024 * 1024
CHAT, TOKENIZER = "/llama.v1.ChatService/", "/llama.v1.TokenizerService/"
COUNT, AT_ONCE = 200, 8


def field(number: int, payload: bytes) -> bytes:
    """A field that holds bytes, a text or a message, as it goes over the wire."""
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


def biases() -> bytes:
    entries = (field(11, b"\x08" + varint(token)) for token in itertools.count())
    return field(2, b"".join(itertools.islice(entries, SIZE // 8)))


def shapes() -> list[tuple[str, bytes]]:
    """Methods with requests."""
    user = b"\x08\x02"
    pair = field(1, user + field(2, b"a")) + field(1, b"\x08\x03" + field(2, b"b"))
    long = field(1, b"\x08\x01" + field(2, many(b"s")[16 * 1024 :]))  # a system message
    return [
        (CHAT + "TextComplete", field(6, field(1, many(b"\x05")))),
        (CHAT + "TextComplete", field(6, many(b"\x08\x05"))),
        (CHAT + "TextComplete", field(1, many(b"\0"))),
        (CHAT + "TextComplete", field(1, many("🦙".encode()))),
        (CHAT + "TextComplete", field(1, many(b"a")[:-1] + b"\xff")),
        (CHAT + "TextComplete", many(field(1, b""))),
        (CHAT + "TextCompleteStream", many(field(6, b""))),
        (CHAT + "ChatComplete", many(field(1, b""))),
        (CHAT + "ChatComplete", field(1, many(field(1, b"")))),
        (CHAT + "ChatComplete", field(1, field(1, user + field(2, many(b"x"))))),
        (CHAT + "ChatComplete", field(2, many(field(6, b"")))),
        (CHAT + "ChatComplete", field(2, field(13, many(b"\x05")))),
        (CHAT + "ChatCompleteStream", biases()),
        (CHAT + "ChatComplete", field(1, long + pair * 500 + field(1, user)) + b"\x28\x02"),
        (CHAT + "RenderPrompt", field(1, long + field(1, user)) + b"\x10\x02"),
        (CHAT + "RenderPrompt", field(1, field(1, user + field(2, many(b"[INST "))))),
        (CHAT + "GetModel", many(b"\xf8\x07\x00")),
        (TOKENIZER + "Encode", many(field(1, b""))),
        (TOKENIZER + "Decode", field(1, field(1, many(b"\x05")))),
        (TOKENIZER + "Encode", field(1, field(1, many(b"a")[:-1] + b"\xff"))),
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
