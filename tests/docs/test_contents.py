"""Contents of pages and examples that are more than the output of a block."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from llama.v1 import chat_pb2, chat_pb2_grpc
from tests.docs.markdown import ROOT, Block, all_pages
from tests.docs.reader import without_figures
from tests.e2e.processes import ServiceProcess

BLOCKS = [block for page in all_pages().values() for block in page]
HELLO = {"role": "ROLE_USER", "content": "Hello!"}
LONG = {"role": "ROLE_USER", "content": "Hello! " * 600}
HUGE = {"role": "ROLE_USER", "content": "Hello! " * 150_000}
WRONG: list[dict[str, Any]] = [
    {"dialogs": [{"messages": [HELLO]}], "sampling": {"temperature": -1}, "top_logprobs": 2},
    {"dialogs": [{"messages": [HELLO]}], "n": 0},
    {"dialogs": [{"messages": [HELLO]}], "sampling": {"stop_token_ids": [1, 2, 3, 32000]}},
    {"dialogs": [{"messages": [HELLO, HELLO]}]},
    {"dialogs": [{"messages": [LONG]}]},
    {"dialogs": [{"messages": [HELLO]}, {"messages": [HUGE]}]},
]


@pytest.fixture(scope="module")
def chat(ports: dict[int, int]) -> Iterator["chat_pb2_grpc.ChatServiceStub"]:
    with grpc.insecure_channel(f"127.0.0.1:{ports[50051]}") as channel:
        yield chat_pb2_grpc.ChatServiceStub(channel)


def test_examples_of_several_answers_show_different_ones(
    chat: "chat_pb2_grpc.ChatServiceStub",
) -> None:
    examples = [block for block in BLOCKS if block.text.startswith("call") and '"n":' in block.text]
    assert examples
    for method, request in map(called, examples):
        response = getattr(chat, method)(request)
        assert len({each.text for each in response.predictions}) == request.n


def test_messages_of_wrong_requests(chat: "chat_pb2_grpc.ChatServiceStub") -> None:
    """As on the page, except for numbers that differ with the demonstration checkpoint."""
    messages = []
    for wrong in WRONG:
        with pytest.raises(grpc.RpcError) as refused:
            chat.ChatComplete(ParseDict(wrong, chat_pb2.ChatCompleteRequest()))
        messages.append(str(refused.value.details()))
    [shown] = checked_by("test_messages_of_wrong_requests")
    assert without_figures(shown.text) == without_figures("\n".join(messages) + "\n")


def test_line_about_memory(services: dict[int, ServiceProcess]) -> None:
    [logged] = [json.loads(line)["event"] for line in services[50053].log if "KV cache" in line]
    [shown] = checked_by("test_line_about_memory")
    assert without_figures(shown.text.strip()) in without_figures(logged)


def test_text_completion_example_shows_what_the_demonstration_checkpoint_has_learned() -> None:
    checkpoint = ROOT / "demo" / "checkpoint"
    passages = tomllib.loads((ROOT / "demo" / "text" / "passages.toml").read_text())["passages"]
    example = ROOT / "example_text_completion.py"
    files = [f"--ckpt_dir={checkpoint}", f"--tokenizer_path={checkpoint / 'tokenizer.model'}"]
    command = [sys.executable, str(example), *files, "--temperature=0"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    _, _, answers = done.stdout.partition("seconds\n")
    texts = [each.strip().replace("\n>", "") for each in answers.split("=" * 34)]
    assert len(texts) == 5
    assert set(texts) <= {*passages, ""}


def test_python_example_asks_a_gateway(services: dict[int, ServiceProcess]) -> None:
    example = str(ROOT / "examples" / "python" / "chat.py")
    command = [sys.executable, example, "What do llamas eat?", services[50051].address]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("Llamas eat grass, hay")


def called(block: Block) -> tuple[str, Any]:
    """The method and the request of a block `call METHOD 'REQUEST'`."""
    _, method, payload = block.text.split(maxsplit=2)
    request = getattr(chat_pb2, f"{method}Request")()
    return method, ParseDict(json.loads(payload.strip("'\n")), request)


def checked_by(test: str) -> list[Block]:
    return [block for block in BLOCKS if block.marks.get("checked-by") == test]
