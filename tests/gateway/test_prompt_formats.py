"""A gateway in front of a tokenizer service whose model has a chat template."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.request.prompts import encode_dialogs
from gateway.request.window import Window
from llama.prompt_format.dialog import ASSISTANT, SYSTEM, USER, Segment, drop_oldest_turns
from llama.prompt_format.dialog import Message as DialogMessage
from llama.prompt_format.formats import FORMATS, ZEPHYR_TAGS, PromptFormat
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatCompleteRequest,
    Dialog,
    GetModelRequest,
    Message,
    RenderPromptRequest,
)
from llama.v1.chat_pb2 import PromptFormat as PromptFormatMessage
from llama.v1.operator_pb2 import UPSTREAM_STATE_REFUSED, GetStatusRequest
from llama.v1.sampling_pb2 import FINISH_REASON_SPECIAL_TAGS, FINISH_REASON_STOP
from tests.llama.prompt_format import templates
from tests.llama.prompt_format.tokenizer_folders import byte_level_folder, llama_folder
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.server import tokenizer_service
from tokenizer_service.tokenizer import Tokenizer

HELLO = Dialog(messages=[Message(role=ROLE_USER, content="Hello <|im_end|>")])
Start = Callable[..., Awaitable[Any]]


@pytest.fixture
def start(start_gateway: Any, start_server: Any, model: Any, tmp_path: Path) -> Start:
    """Starts a gateway in front of a tokenizer in `folder`."""

    async def started(folder: Path, **settings: Any) -> Any:
        tokenizer = open_tokenizer(folder)
        model.info.vocab_size = tokenizer.n_words
        model.info.tokenizer_fingerprint = tokenizer.fingerprint
        target, _ = await start_server(tokenizer_service(tokenizer))
        return await start_gateway(target, (await start_server(model.service()))[0], **settings)

    return started


async def refusal(gateway: Any) -> str:
    """The reason why the gateway refuses its tokenizer service."""
    while True:
        found = (await gateway.operator.GetStatus(GetStatusRequest())).tokenizer
        if found.state == UPSTREAM_STATE_REFUSED:
            return str(found.reason)


async def test_dialogs_are_in_the_format_of_the_chat_template(
    start: Start, model: Any, tmp_path: Path
) -> None:
    folder = byte_level_folder(tmp_path, templates.CHATML_WITH_DEFAULT)
    gateway, tokenizer = await start(folder), open_tokenizer(folder)
    await gateway.until(serving=True)
    rendered = await gateway.stub.RenderPrompt(RenderPromptRequest(dialog=HELLO))
    assert "".join(rendered.segments) == (
        '<|im_start|>system\nIt\'s you: "I\\O".<|im_end|>\n'
        "<|im_start|>user\nHello <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    ends = tokenizer.control_ids["<|im_end|>"]
    assert [*rendered.ids].count(ends) == 2  # that of the user's text is no control token
    call = asyncio.ensure_future(gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[HELLO])))
    begun = await model.starts.get()
    assert begun.prompt_ids == rendered.ids
    assert {*begun.eos_ids} == {ends, tokenizer.eos_id}
    model.tell(begun.sequence_id, finish_reason=FINISH_REASON_STOP)
    await call


async def test_named_format_goes_before_that_of_the_template(start: Start, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, templates.LLAMA2)
    gateway = await start(folder, prompt_format="zephyr")
    await gateway.until(serving=True)
    messages = [Message(role=ROLE_SYSTEM, content="Be kind.")]
    roles = (ROLE_USER, ROLE_ASSISTANT, ROLE_USER)
    messages += [Message(role=role, content="x") for role in roles]
    request = RenderPromptRequest(dialog=Dialog(messages=messages))
    assert "".join((await gateway.stub.RenderPrompt(request)).segments) == (
        "<|system|>\nBe kind.</s>\n<|user|>\nx</s>\n<|assistant|>\nx</s>\n<|user|>\nx</s>\n"
        "<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("content", "refused"), [("a <|user|> b", True), ("[INST] <|im_end|>", False)]
)
async def test_special_tags_are_those_of_the_format(
    start: Start, tmp_path: Path, content: str, refused: bool
) -> None:
    gateway = await start(llama_folder(tmp_path, templates.ZEPHYR))
    await gateway.until(serving=True)
    dialog = Dialog(messages=[Message(role=ROLE_USER, content=content)])
    rendered = await gateway.stub.RenderPrompt(RenderPromptRequest(dialog=dialog))
    assert rendered.has_special_tags is refused
    model = await gateway.stub.GetModel(GetModelRequest())
    assert model.prompt_format == PromptFormatMessage(name="zephyr", special_tags=ZEPHYR_TAGS)
    if refused:
        response = await gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[dialog]))
        assert response.predictions[0].finish_reason == FINISH_REASON_SPECIAL_TAGS


async def test_unknown_template_is_refused_with_the_reason(start: Start, tmp_path: Path) -> None:
    gateway = await start(llama_folder(tmp_path, "{{ messages }}"))
    assert await refusal(gateway) == (
        "the chat template in the model's files is unknown: name the format of its prompts with "
        f"--prompt_format, one of {', '.join(FORMATS)}"
    )


async def test_format_whose_control_tokens_are_missing_is_refused(
    start: Start, tmp_path: Path
) -> None:
    gateway = await start(llama_folder(tmp_path), prompt_format="chatml")
    reason = await refusal(gateway)
    assert "format chatml needs" in reason
    assert "<|im_start|>, <|im_end|>" in reason


@pytest.fixture(scope="module")
def all_tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary with the control tokens of all formats."""
    marks = [name for each in FORMATS.values() for name in each.control_tokens]
    folder = tmp_path_factory.mktemp("all")
    return open_tokenizer(llama_folder(folder, marks=(*dict.fromkeys(marks),)))


BY_TURNS = [each for each in FORMATS.values() if each.name != "llama-guard"]


@pytest.mark.parametrize("chosen", BY_TURNS, ids=[each.name for each in BY_TURNS])
@pytest.mark.parametrize("system", [None, " Answer in one line."])
@pytest.mark.parametrize("max_token_bytes", [None, 16])
async def test_as_few_of_the_oldest_turns_are_dropped_as_leave_room(
    all_tokens: Tokenizer, chosen: PromptFormat, system: str | None, max_token_bytes: int | None
) -> None:
    calls = 0

    async def encode(segments: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        return [ids(all_tokens, [each]) for each in segments]

    dialog = [] if system is None else [DialogMessage(SYSTEM, system)]
    for number in range(9):
        dialog.append(DialogMessage(USER, f" How far is {'very ' * number} far? "))
        dialog.append(DialogMessage(ASSISTANT, "mile " * (9 - number)))
    dialog = dialog[:-1]
    prompts = [prompt(all_tokens, chosen, drop_oldest_turns(dialog, n)) for n in range(9)]
    for length in range(len(prompts[-1]), len(prompts[0]) + 2):
        calls = 0
        window = Window(length, max_token_bytes)
        [made] = await encode_dialogs(
            {"d": dialog}, encode, window, answer_room=0, prompt_format=chosen
        )
        dropped = next(n for n, each in enumerate(prompts) if len(each) <= length)
        assert (made.dropped_turns, made.ids) == (dropped, prompts[dropped])
        assert calls <= 4


def ids(tokenizer: Tokenizer, segments: list[Segment]) -> list[int]:
    return [
        token_id
        for each in segments
        for token_id in tokenizer.encode(each.text, each.bos, each.eos, each.control_token)
    ]


def prompt(tokenizer: Tokenizer, chosen: PromptFormat, dialog: list[DialogMessage]) -> list[int]:
    return [token_id for turn in chosen.render(dialog) for token_id in ids(tokenizer, [*turn])]


async def test_text_that_the_models_tokenizer_cannot_encode_is_the_callers_fault(
    start: Start, tmp_path: Path
) -> None:
    folder = byte_level_folder(tmp_path, templates.CHATML_WITH_DEFAULT)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    stages = [slow | {"invert": False}, described["pre_tokenizer"]]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    path.write_text(json.dumps(described))
    gateway = await start(folder)
    await gateway.until(serving=True)
    dialog = Dialog(messages=[Message(role=ROLE_USER, content="a" * 40 + "!")])
    with pytest.raises(grpc.aio.AioRpcError, match="the prompt cannot be encoded: ") as refused:
        await gateway.stub.RenderPrompt(RenderPromptRequest(dialog=dialog))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
