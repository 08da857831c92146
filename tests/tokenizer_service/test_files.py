"""Files of tokenizers that are refused: each with the reason, and what to use instead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from llama.model_files import ModelFileError
from tests.tokenizer_service.forms import llama_gguf, llama_tokenizer_json, write_gguf
from tokenizer_service.open_tokenizer import open_tokenizer

Change = Callable[[dict[str, Any]], None]


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as error:
        open_tokenizer(path)
    return str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\x0e\n", b"0123" * 1000])
def test_damaged_sentencepiece_model_is_named_with_the_fix(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} is damaged or not a SentencePiece model; use ")


def test_truncated_sentencepiece_model_is_refused(tmp_path: Path, model_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_path.read_bytes()[:1000])
    assert refusal(path).startswith(f"{path} is damaged or not a SentencePiece model; use ")


def test_llama_3s_tokenizer_model_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"IQ== 0\nIg== 1\n" * 100)
    assert refusal(path) == (
        f"{path} is Llama 3's tokenizer.model, a list of tokens for tiktoken; use the "
        "tokenizer.json that came with the checkpoint"
    )


def test_missing_file_is_named_with_what_to_name(tmp_path: Path) -> None:
    path = tmp_path / "missing.model"
    assert refusal(path).startswith(f"cannot read {path}: No such file or directory; ")
    assert "tokenizer_path must name" in refusal(path)


def test_folder_without_a_tokenizer_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path).startswith(
        f"{tmp_path} has no tokenizer: looked for tokenizer.json, tokenizer.model and *.gguf"
    )


def test_folder_with_two_gguf_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{tmp_path} has 2 GGUF files: name one, as {tmp_path}/a.gguf"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is not JSON: "),
        ("[]", "is not a usable tokenizer.json: it holds no object"),
        ("{}", "is not a usable tokenizer.json: it has no model"),
        ('{"model": {"type": "WordPiece"}}', "its model is of the type WordPiece, and only BPE"),
        ('{"model": {"type": "Unigram"}}', "came with a tokenizer.model, use that"),
        ('{"model": {"type": "BPE"}}', "its model has no vocab or no merges"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocab is empty"),
    ],
)
def test_unusable_tokenizer_json_is_named_with_the_reason(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    assert refusal(path).startswith(f"{path} ")
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda each: each["model"].update(byte_fallback=False), "lacks pieces for bytes"),
        (lambda each: each["model"]["vocab"].pop("<0x0A>"), "lacks pieces for bytes"),
        (lambda each: each["model"].update(end_of_word_suffix="</w>"), "prefixes or suffixes"),
        (lambda each: each.update(decoder=None), "its decoder is neither ByteLevel nor"),
        (lambda each: each.update(decoder={"type": "ByteLevel"}), "it does not encode bytes"),
        (lambda each: each.update(normalizer={"type": "None"}), "`tokenizers` cannot read it"),
        (lambda each: each["added_tokens"][1].update(id=2**40), "id of '</s>' must be from 0"),
        (lambda each: each["model"]["vocab"].update(a=-1), "the id of 'a' must be from 0"),
        (lambda each: each.update(decoder=[]), "is not a usable tokenizer.json"),
        (lambda each: each.update(added_tokens={"a": 1}), "is not a usable tokenizer.json"),
        (lambda each: each.update(added_tokens=[]), "does not say which token ends a text"),
    ],
)
def test_tokenizer_json_that_would_not_be_exact_is_refused(
    tmp_path: Path, reference: SentencePieceProcessor, change: Change, reason: str
) -> None:
    path = llama_tokenizer_json(reference, tmp_path / "tokenizer.json")
    description = json.loads(path.read_text())
    change(description)
    del description["model"]["vocab"]["</s>"]
    path.write_text(json.dumps(description))
    assert reason in refusal(path)


def test_id_of_an_end_that_the_tokenizer_lacks_is_named(
    tmp_path: Path, reference: SentencePieceProcessor
) -> None:
    path = llama_tokenizer_json(reference, tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 560]}')
    assert refusal(path).startswith(
        f"{path} has 560 tokens, but by the files that came with it 560"
    )


@pytest.mark.parametrize("size", [0, 3, 4, 20, 100, 5000])
def test_truncated_gguf_is_refused(
    tmp_path: Path, reference: SentencePieceProcessor, size: int
) -> None:
    path = llama_gguf(reference, tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(path).startswith(f"{path} is damaged or not a GGUF file: it ")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "it lacks tokenizer.ggml.model"),
        ({"model": "bert"}, 'tokenizer.ggml.model is "bert"; "llama" and "gpt2" are supported'),
        ({"model": "llama", "tokens": ["a"]}, "it lacks tokenizer.ggml.token_type"),
        ({"model": "llama", "tokens": ["a"], "token_type": [1, 1]}, "has 2 values for 1 tokens"),
        ({"model": "gpt2", "pre": "viking"}, 'tokenizer.ggml.pre is "viking", and only default, '),
        ({"model": "gpt2", "eos_token_id": 1}, "it lacks tokenizer.ggml.pre"),
        ({"model": "gpt2", "pre": "gpt-2"}, "it lacks tokenizer.ggml.eos_token_id"),
    ],
)
def test_gguf_vocabulary_that_is_not_supported_is_named(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    path = write_gguf(tmp_path / "model.gguf", **values)
    assert refusal(path).startswith(f"{path} has no usable tokenizer: ")
    assert reason in refusal(path)
