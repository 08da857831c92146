"""Tokenizer files that are damaged or made to do harm: refused at the start, or without effect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from llama.model_files import ModelFileError
from llama.v1.tokenizer_pb2 import EncodeRequest, Segment
from serving.errors import RequestError
from tests.tokenizer_service.forms import added_token, bos_template, write_gguf
from tokenizer_service.open_tokenizer import open_tokenizer
from tokenizer_service.server import TokenizerServicer
from tokenizer_service.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = {piece: number for number, piece in enumerate([*ALPHABET, "he", "</", "s>", "</s>"])}
END = "<|im_end|>"
TO_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
TO_BYTES |= {"use_regex": False}
Change = Callable[[dict[str, Any]], object]


def description() -> dict[str, Any]:
    """A tokenizer.json with pieces of bytes."""
    return {
        "version": "1.0",
        "added_tokens": [added_token(END, 300)],
        "normalizer": None,
        "pre_tokenizer": TO_BYTES,
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "vocab": dict(IDS),
            "merges": [["h", "e"], ["<", "/"], ["s", ">"], ["</", "s>"]],
        },
    }


def opened(folder: Path, change: Change, **config: object) -> Tokenizer:
    """The changed tokenizer.json, with a tokenizer_config.json beside it."""
    described = description()
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
    return open_tokenizer(folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False)


def split_by(expression: str) -> Change:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return replaced(pre_tokenizer=sequence(split | {"invert": False}, TO_BYTES))


def sequence(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [*stages]}


def replaced(**parts: object) -> Change:
    return lambda each: each.update(parts)


def in_model(**parts: object) -> Change:
    return lambda each: each["model"].update(parts)


def adds(*tokens: object) -> Change:
    return lambda each: each["added_tokens"].extend(tokens)


TWO_IDS = bos_template("he", 256)
TWO_IDS["special_tokens"]["he"]["ids"] = [256, 257]
NO_IDS = bos_template("he", 256)
NO_IDS["special_tokens"] = {}
REFUSED: dict[str, tuple[Change, str]] = {
    "panic while it is read": (in_model(merges=[["he", "s>"]]), "cannot read it"),
    "panic on any text": (
        replaced(pre_tokenizer=sequence({"type": "FixedLength", "length": 0}, TO_BYTES)),
        "chunk size must be non-zero",
    ),
    "empty prefix": (replaced(normalizer={"type": "Prepend", "prepend": ""}), "cannot read it"),
    "damaged table of characters": (
        replaced(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "Cannot parse precompiled_charsmap",
    ),
    "unknown token that is none": (
        lambda each: (
            in_model(unk_token="<unk>", merges=[])(each),
            each["model"]["vocab"].pop("h"),
        ),
        "Unk token `<unk>` not found",
    ),
    "merge of one token": (in_model(merges=["he"]), "its merge 'he' is not one of two tokens"),
    "merge of numbers": (in_model(merges=[[1, 2]]), "its merge [1, 2] is not one of two tokens"),
    "added token without content": (adds({"id": 5}), "{'id': 5} has no text as content"),
    "added token without id": (adds({"content": "x"}), "the id of 'x' must be"),
    "added token that is empty": (adds(added_token("", 301)), "whose content is empty"),
    "post-processor that is a text": (replaced(post_processor="x"), "not a usable"),
    "BOS of two ids": (replaced(post_processor=TWO_IDS), "something else than one token"),
    "BOS of no id": (replaced(post_processor=NO_IDS), "something else than one token"),
    "BOS below 0": (
        replaced(post_processor=bos_template("he", -2)),
        "something else than one token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_tokenizer_json_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    change, reason = REFUSED[name]
    with pytest.raises(ModelFileError) as error:
        opened(tmp_path, change)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'} is not a usable ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_deeply_nested_json_is_refused(tmp_path: Path, name: str) -> None:
    opened(tmp_path, replaced())
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match=f"{name} is not JSON: "):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [[5], [{"name": [1], "template": "x"}], {}, 5])
def test_chat_template_of_another_kind_is_none(tmp_path: Path, template: object) -> None:
    assert opened(tmp_path, replaced(), chat_template=template).chat_template == ""


def test_chat_template_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="chat_template is not valid unicode"):
        opened(tmp_path, replaced(), chat_template="\ud800")


CONTROLS: dict[str, tuple[Change, str, int]] = {
    "two names of one id": (adds(added_token("<|x|>", 256)), "he", 256),
    "BOS of the post-processor": (
        replaced(post_processor=bos_template("he", 256)),
        "he",
        256,
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_text_has_no_id_that_is_also_a_control_tokens(tmp_path: Path, name: str) -> None:
    change, text, token_id = CONTROLS[name]
    tokenizer = opened(tmp_path, change)
    assert token_id not in ids_of(tokenizer, text)
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize("ends", [None, {"eos_token_id": IDS["</s>"]}])
def test_end_that_is_listed_as_an_ordinary_token_has_no_text(
    tmp_path: Path, ends: dict[str, int] | None
) -> None:
    if ends is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    tokenizer = opened(tmp_path, replaced(), eos_token=None)
    assert tokenizer.eos_id == IDS["</s>"]
    assert tokenizer.eos_id not in ids_of(tokenizer, "a</s>")
    assert tokenizer.decode(ids_of(tokenizer, "a</s>")) == "a</s>"


@given(text=st.text(st.sampled_from("!a\n")))
def test_byte_that_is_also_the_padding_stays_text(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("padding")
    tokenizer = opened(folder, adds(added_token("!", IDS["!"])), pad_token="!")
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize("part", ["truncation", "padding"])
def test_truncation_and_padding_of_the_file_change_no_prompt(tmp_path: Path, part: str) -> None:
    settings = {
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst"},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0},
    }
    settings["truncation"] |= {"stride": 0}
    settings["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}
    tokenizer = opened(tmp_path, replaced(**{part: settings[part]}))
    assert ids_of(tokenizer, "hehe") == [256, 256]


async def test_text_on_which_the_expression_takes_too_long_is_the_callers_fault(
    tmp_path: Path,
) -> None:
    servicer = TokenizerServicer(opened(tmp_path, split_by("(a+)+$")))
    segments = [Segment(text="aaaa"), Segment(text="a" * 40 + "!")]
    with pytest.raises(RequestError) as error:
        await servicer.Encode(EncodeRequest(segments=segments), None)
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.message.startswith(
        "segments[1].text: the model's tokenizer cannot encode it: Onig: Regex search error"
    )
    response = await servicer.Encode(EncodeRequest(segments=segments[:1]), None)
    assert list(response.segments[0].ids) == [IDS["a"]] * 4


GGUF: dict[str, Any] = {
    "model": "gpt2",
    "pre": "llama-bpe",
    "tokens": [*ALPHABET, "he", END],
    "token_type": [1] * 257 + [3],
    "merges": ["h e"],
    "eos_token_id": 257,
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "tokens": ["<s>", "</s>", "?", *BYTES],
    "token_type": [3, 3, 1] + [6] * 256,
    "scores": [0.0] * 259,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (GGUF | {"tokens": [*ALPHABET, "a", END]}, "tokenizer.ggml.tokens has 'a' twice"),
        (GGUF | {"bos_token_id": True}, "tokenizer.ggml.bos_token_id is no int"),
        (GGUF | {"token_type": [True] * 258}, "token_type holds other values than int"),
        (SENTENCEPIECE | {"tokens": ["<s>", "</s>", "<s>", *BYTES]}, "has '<s>' twice"),
        (SENTENCEPIECE | {"unknown_token_id": 5000}, "unknown_token_id 5000 is the id of no token"),
    ],
)
def test_damaged_gguf_vocabulary_is_refused_with_the_reason(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelFileError) as error:
        open_tokenizer(write_gguf(tmp_path / "a.gguf", **values))
    assert reason in str(error.value)


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", "bos_token_id"])
def test_id_of_minus_one_stands_for_no_token_in_a_gguf_file(tmp_path: Path, key: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", **GGUF | {key: 2**32 - 1})
    content = path.read_bytes()
    kind, minus_one = (5).to_bytes(4, "little"), b"\xff" * 4  # INT32
    path.write_bytes(content.replace((4).to_bytes(4, "little") + minus_one, kind + minus_one))
    tokenizer = open_tokenizer(path)
    TokenizerServicer(tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (-1, (257,))
