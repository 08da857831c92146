"""The files beside a checkpoint's weights: tokenizers, chat templates, ends of answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from sentencepiece import SentencePieceProcessor

from llama.gguf_header import GgufError, read_metadata
from llama.model_files import (
    ModelFileError,
    TokenizerForm,
    answer_end_ids,
    chat_template,
    embedding_fits,
    find_tokenizer,
    tokenizer_fingerprint,
)
from tests.llama.conftest import TOKENIZER
from tests.tokenizer_service.forms import llama_gguf, write_gguf


def write(folder: Path, **files: object) -> Path:
    """Writes files by their names without suffix: text as Jinja, all else as JSON."""
    (folder / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        if isinstance(content, str):
            (folder / f"{name}.jinja").write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_folder_prefers_the_tokenizer_that_knows_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find_tokenizer(tmp_path).form is TokenizerForm.GGUF
    (tmp_path / "tokenizer.model").write_bytes(Path(TOKENIZER).read_bytes())
    assert find_tokenizer(tmp_path).form is TokenizerForm.SENTENCEPIECE
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"
    assert find_tokenizer(tmp_path / "tokenizer.model").form is TokenizerForm.SENTENCEPIECE


def test_content_decides_where_a_name_says_nothing(tmp_path: Path) -> None:
    for content, form in [
        (b"GGUF\x03", TokenizerForm.GGUF),
        (b'{"model": {}}', TokenizerForm.TOKENIZER_JSON),
        (b"\n\x0e\n\x05<unk>", TokenizerForm.SENTENCEPIECE),
    ]:
        (tmp_path / "blob").write_bytes(content)
        assert find_tokenizer(tmp_path / "blob").form is form


def test_fingerprint_is_that_of_the_file() -> None:
    digest = hashlib.sha256(Path(TOKENIZER).read_bytes()).hexdigest()
    assert tokenizer_fingerprint(Path(TOKENIZER)) == digest


def test_fingerprint_of_a_gguf_file_depends_on_its_vocabulary_alone(tmp_path: Path) -> None:
    model = SentencePieceProcessor(model_file=TOKENIZER)
    first = tokenizer_fingerprint(llama_gguf(model, tmp_path / "a.gguf"))
    templated = llama_gguf(model, tmp_path / "b.gguf", chat_template="{{ messages }}")
    assert tokenizer_fingerprint(templated) == first
    shorter = llama_gguf(model, tmp_path / "c.gguf", count=559)
    assert tokenizer_fingerprint(shorter) != first


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, ""),
        ({"tokenizer_config": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config": {"chat_template": "config"}, "chat_template": "file"}, "file"),
        ({"tokenizer_config": {"chat_template": [{"name": "tools", "template": "t"}]}}, ""),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "tools", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
    ],
)
def test_chat_template_is_found_as_transformers_finds_it(
    tmp_path: Path, files: dict[str, Any], template: str
) -> None:
    assert chat_template(write(tmp_path, **files)) == template


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": None}}, ()),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [9, 8, 9]}}, (9, 8)),
    ],
)
def test_ends_of_answers_are_those_of_generation(
    tmp_path: Path, files: dict[str, Any], ids: tuple[int, ...]
) -> None:
    assert answer_end_ids(write(tmp_path, **files)) == ids


@pytest.mark.parametrize("value", ["2", [2, "3"], -1, True, 1.5])
def test_end_of_an_answer_that_is_no_id_is_named(tmp_path: Path, value: object) -> None:
    write(tmp_path, config={"eos_token_id": value})
    with pytest.raises(ModelFileError, match=r"config\.json: eos_token_id must be an id or a list"):
        answer_end_ids(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": "\xff"}'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"/config\.json .* download it again"):
        answer_end_ids(tmp_path)


def test_ends_in_a_gguf_file_are_those_of_text_turn_and_message(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", eos_token_id=5, eot_token_id=3, eom_token_id=5)
    assert answer_end_ids(path) == (5, 3)


@pytest.mark.parametrize(
    ("rows", "fits"), [(31999, False), (32000, True), (33600, True), (33601, False)]
)
def test_embedding_may_have_a_few_rows_more_than_tokens(rows: int, fits: bool) -> None:
    assert embedding_fits(rows, 32000) is fits


def test_metadata_is_that_of_the_gguf_package(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", val=True)
    writer.add_string("string", "llama 🦙")
    writer.add_array("strings", ["a", "", "é"])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = GGUFReader(tmp_path / "a.gguf").fields
    expected = {k: v.contents() for k, v in fields.items() if not k.startswith("GGUF.")}
    assert read_metadata(tmp_path / "a.gguf") == expected


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"GGML", "does not begin with GGUF"),
        (b"GGUF\x01\0\0\0", "has version 1"),
        (b"GGUF\0\0\0\x03", "is big-endian"),
        (b"GGUF\x03\0\0\0", "ends in its metadata"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\xff" * 8, "more than any model"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8, "ends in its metadata"),
    ],
)
def test_damaged_metadata_is_refused_at_once(tmp_path: Path, header: bytes, reason: str) -> None:
    (tmp_path / "a.gguf").write_bytes(header)
    with pytest.raises(GgufError, match=reason):
        read_metadata(tmp_path / "a.gguf")


def value(kind: int, content: bytes) -> bytes:
    """A file with one key, `k`, of this type."""
    header = b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little")
    return header + (1).to_bytes(8, "little") + b"k" + kind.to_bytes(4, "little") + content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (value(99, b""), "k has the unknown type 99"),
        (value(8, (2).to_bytes(8, "little") + b"\xff\xff"), "k has a text that is not UTF-8"),
        (value(9, (8).to_bytes(4, "little") + b"\xff" * 8), "ends in its metadata"),
        (value(9, ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 9), "nested more than"),
    ],
)
def test_damaged_value_is_refused_by_its_key(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content + bytes(16))
    with pytest.raises(GgufError, match=reason):
        read_metadata(tmp_path / "a.gguf")
