"""Tokenize and Detokenize against the tokenizer itself."""

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.request.tokenization import MAX_TEXT_BYTES
from gateway.text.detokenizer import text_of
from gateway.text.token_bytes import TokenBytes
from gateway.text.vocabulary import Vocabulary
from llama.prompt_format import dialog
from llama.v1.chat_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatCompleteRequest,
    DetokenizeRequest,
    Dialog,
    Message,
    TokenizeRequest,
    TokenizeResponse,
)
from llama.v1.sampling_pb2 import TokenIds
from tests.gateway.conftest import RunningGateway, ScriptedModel, StartGateway, StartServer
from tests.llama.prompt_format.tokenizer_folders import byte_level_folder
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.tokenizer import Tokenizer

TEXTS = ["", " ", "What do llamas eat?", "  two  spaces\n", "naïve 🦙 ½", "<s>[INST]</s>", "a\0b"]
DIALOG = [
    dialog.Message(dialog.SYSTEM, "Be brief."),
    dialog.Message(dialog.USER, " Hello 🦙 "),
    dialog.Message(dialog.ASSISTANT, "Hi!"),
    dialog.Message(dialog.USER, "And at night?"),
]
ROLES = {"system": ROLE_SYSTEM, "user": ROLE_USER, "assistant": ROLE_ASSISTANT}


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level"])
def library(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Vocabulary]:
    """A tokenizer, and the vocabulary that the gateway has of it."""
    chosen = tokenizer
    if request.param == "byte_level":
        chosen = open_tokenizer(byte_level_folder(tmp_path_factory.mktemp("tokenizer")))
    pieces = [(piece.bytes, piece.kind) for piece in chosen.vocabulary()]
    vocabulary = Vocabulary.build(
        pieces,
        dummy_prefix=chosen.dummy_prefix,
        eos_ids=chosen.eos_ids,
        byte_level=chosen.byte_level,
    )
    return chosen, vocabulary


@given(text=st.text())
def test_bytes_of_a_texts_tokens_are_those_of_the_text(
    library: tuple[Tokenizer, Vocabulary], text: str
) -> None:
    tokenizer, vocabulary = library
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert b"".join(map(TokenBytes(vocabulary).push, ids)) == text.encode()


@given(ids=st.lists(st.integers(0, 559), max_size=12))
def test_bytes_of_any_tokens_are_those_of_their_text_where_it_is_whole(
    vocabulary: Vocabulary, ids: list[int]
) -> None:
    text = text_of(ids, vocabulary)
    if "\ufffd" not in text:
        assert b"".join(map(TokenBytes(vocabulary).push, ids)).decode() == text


@pytest.mark.parametrize(("bos", "eos"), [(None, False), (True, True), (False, True)])
async def test_ids_of_texts_are_the_librarys_and_back(
    gateway: RunningGateway, tokenizer: Tokenizer, bos: bool | None, eos: bool
) -> None:
    request = TokenizeRequest(texts=TEXTS, bos=bos, eos=eos)
    response = await gateway.stub.Tokenize(request)
    ids = [[*each.ids] for each in response.tokenizations]
    assert ids == [tokenizer.encode(text, bos=bos is not False, eos=eos) for text in TEXTS]
    assert not any(each.tokens for each in response.tokenizations)
    back = await gateway.stub.Detokenize(
        DetokenizeRequest(sequences=[TokenIds(ids=each) for each in ids])
    )
    assert [each.text for each in back.texts] == TEXTS
    assert [each.bytes for each in back.texts] == [text.encode() for text in TEXTS]


async def test_ids_of_dialogs_are_those_of_their_prompts(
    gateway: RunningGateway, model: ScriptedModel, tokenizer: Tokenizer
) -> None:
    messages = [Message(role=ROLES[each.role], content=each.content) for each in DIALOG]
    dialogs = [Dialog(messages=messages), Dialog(messages=messages[-1:])]
    response = await gateway.stub.Tokenize(TokenizeRequest(dialogs=dialogs, tokens=True))
    call = asyncio.ensure_future(gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=dialogs)))
    starts = [await model.starts.get() for _ in dialogs]
    call.cancel()
    whole = [tokenizer.encode(s.text, s.bos, s.eos) for s in dialog.render(DIALOG)]
    assert [*response.tokenizations[0].ids] == [token for turn in whole for token in turn]
    assert [each.ids for each in response.tokenizations] == [each.prompt_ids for each in starts]
    for each in response.tokenizations:
        assert [token.id for token in each.tokens] == [*each.ids]


async def test_tokens_have_their_texts_bytes_and_places(
    gateway: RunningGateway, tokenizer: Tokenizer
) -> None:
    text = "Hi naïve 🦙!"
    [found] = (
        await gateway.stub.Tokenize(TokenizeRequest(texts=[text], tokens=True))
    ).tokenizations
    pieces, encoded = tokenizer.vocabulary(), text.encode()
    ends = [*(token.offset for token in found.tokens[1:]), len(encoded)]
    for token, end in zip(found.tokens, ends, strict=True):
        assert token.bytes == pieces[token.id].bytes
        # The first piece begins with the space that belongs to the encoding.
        assert encoded[token.offset : end] == token.bytes[token.offset == 0 :]
    llama = [token for token in found.tokens if token.offset >= encoded.index("🦙".encode())]
    assert [token.bytes for token in llama[:4]] == [bytes([each]) for each in "🦙".encode()]
    assert [token.text for token in llama[:4]] == ["\ufffd"] * 4


async def test_bytes_are_exact_where_characters_are_cut(
    gateway: RunningGateway, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("x🦙", bos=True, eos=False)
    request = DetokenizeRequest(sequences=[TokenIds(ids=ids[:-2]), TokenIds(ids=ids[-2:])])
    first, rest = (await gateway.stub.Detokenize(request)).texts
    assert (first.text, rest.text) == ("x\ufffd\ufffd", "\ufffd\ufffd")
    assert (first.bytes + rest.bytes).decode() == "x🦙"


async def test_context_length_is_no_limit(gateway: RunningGateway, tokenizer: Tokenizer) -> None:
    long = "The llama walks over the bridge. " * 3000
    user = Dialog(messages=[Message(role=ROLE_USER, content=long)])
    text = await gateway.stub.Tokenize(TokenizeRequest(texts=[long]))
    rendered = await gateway.stub.Tokenize(TokenizeRequest(dialogs=[user]))
    ids = tokenizer.encode(long, bos=True, eos=False)
    assert [*text.tokenizations[0].ids] == ids
    assert len(rendered.tokenizations[0].ids) > len(ids)
    back = await gateway.stub.Detokenize(DetokenizeRequest(sequences=[TokenIds(ids=ids)]))
    assert back.texts[0].text == long


HELLO = Dialog(messages=[Message(role=ROLE_USER, content="Hello")])
WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (TokenizeRequest(), "texts: must not be empty"),
    "both": (
        TokenizeRequest(texts=["a"], dialogs=[HELLO], bos=True),
        "texts: cannot be given together with dialogs; bos: cannot be given together with dialogs",
    ),
    "role": (
        TokenizeRequest(dialogs=[HELLO, Dialog(messages=[Message(role=ROLE_ASSISTANT)])]),
        "dialogs[1].messages[0].role: the first message must be from the system or the user, not "
        "from the assistant",
    ),
    "many": (TokenizeRequest(texts=["a"] * 65), "texts: must hold at most 64 entries, not 65"),
    "long": (
        TokenizeRequest(texts=["a", "b" * (MAX_TEXT_BYTES + 1)]),
        f"texts[1]: must have at most {MAX_TEXT_BYTES} bytes, not {MAX_TEXT_BYTES + 1}: tokenize "
        "it in parts",
    ),
    "long_dialog": (
        TokenizeRequest(
            dialogs=[Dialog(messages=[Message(role=ROLE_USER, content="é" * MAX_TEXT_BYTES)])]
        ),
        f"dialogs[0]: must have at most {MAX_TEXT_BYTES} bytes, not {2 * MAX_TEXT_BYTES}: tokenize "
        "it in parts",
    ),
    "no_ids": (DetokenizeRequest(), "sequences: must not be empty"),
    "id": (
        DetokenizeRequest(sequences=[TokenIds(ids=[1]), TokenIds(ids=[5] * 3000 + [560, 561])]),
        "sequences[1].ids[3000]: must be less than the vocabulary size, 560, not 560",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_requests_are_told_field_and_rule(gateway: RunningGateway, name: str) -> None:
    request, message = WRONG[name]
    method = getattr(gateway.stub, type(request).__name__.removesuffix("Request"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await method(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == message


async def test_answers_above_the_limit_are_refused(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    gateway = await start_gateway(tokenizer_target, address, max_response_bytes=1024)
    await gateway.until(serving=True)
    fits = await gateway.stub.Tokenize(TokenizeRequest(texts=["llama " * 100]))
    assert isinstance(fits, TokenizeResponse)
    ids = TokenIds(ids=[300] * 2000)
    too_large: list[tuple[Any, Any]] = [
        (gateway.stub.Tokenize, TokenizeRequest(texts=["llama " * 100], tokens=True)),
        (gateway.stub.Tokenize, TokenizeRequest(texts=["llama " * 1000])),
        (gateway.stub.Detokenize, DetokenizeRequest(sequences=[ids])),
    ]
    for method, request in too_large:
        with pytest.raises(grpc.aio.AioRpcError, match="the answer has more than 1024 bytes") as e:
            await method(request)
        assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_both_calls_take_a_place_in_the_queue(
    start_gateway: StartGateway,
    start_server: StartServer,
    tokenizer_target: str,
    model: ScriptedModel,
) -> None:
    address, _ = await start_server(model.service())
    one = {"max_queued_sequences": 1, "max_dialogs": 1}
    gateway = await start_gateway(tokenizer_target, address, **one)
    await gateway.until(serving=True)
    calls: list[tuple[Any, Any]] = [
        (gateway.stub.Tokenize, TokenizeRequest(texts=["a"])),
        (gateway.stub.Detokenize, DetokenizeRequest(sequences=[TokenIds(ids=[5])])),
    ]
    for method, request in calls:
        assert await method(request)
        running = gateway.stub.ChatComplete(ChatCompleteRequest(dialogs=[HELLO]))
        start = await model.starts.get()
        with pytest.raises(grpc.aio.AioRpcError, match="the queue is full: 1 of 1 sequences"):
            await method(request)
        running.cancel()
        assert await model.cancels.get() == start.sequence_id
        assert await _once_free(method, request)


async def _once_free(method: Any, request: Any) -> Any:
    """The answer once the cancelled request has left the queue."""
    while True:
        try:
            return await method(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
