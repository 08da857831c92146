"""The number of tokens in a tokenizer's file, read without the libraries that tokenize."""

import json
from pathlib import Path

from llama.model_files import ModelFileError, TokenizerForm, find_tokenizer, gguf_metadata

_FETCH_AGAIN = "copy or download it again"
_PIECES = 1  # the field of sentencepiece.ModelProto with one message for each token


def vocabulary_size(path: Path) -> int:
    """The number of tokens of the tokenizer that `path` names.

    Raises:
        ModelFileError: there is none, or its file is damaged.
    """
    found = find_tokenizer(path)
    if found.form is TokenizerForm.GGUF:
        return len(gguf_metadata(found.path).get("tokenizer.ggml.tokens", ()))
    content = found.path.read_bytes()
    try:
        if found.form is TokenizerForm.TOKENIZER_JSON:
            return _in_json(content)
        return _in_sentencepiece(content)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelFileError(
            f"{found.path} is damaged or no {found.form.value}: {_FETCH_AGAIN}"
        ) from error


def _in_json(content: bytes) -> int:
    """One more than the largest id."""
    described = json.loads(content)
    vocabulary = described["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = (token["id"] for token in described.get("added_tokens", ()))
    return int(max([*ids, *added])) + 1


def _in_sentencepiece(content: bytes) -> int:
    """The number of pieces: the file is one protobuf message, walked field by field."""
    at = count = 0
    while at < len(content):
        tag, at = _varint(content, at)
        match tag & 7:
            case 0:
                _, at = _varint(content, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(content, at)
                at += length
            case 5:
                at += 4
            case _:
                raise ValueError("no protobuf")
        count += tag >> 3 == _PIECES
    if at != len(content) or not count:
        raise ValueError("cut short")
    return count


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and the position behind it."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
