"""One vocabulary in the forms in which people have it: a tokenizer.json and a GGUF file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def sentencepiece_kinds(model: SentencePieceProcessor) -> list[int]:
    """The type of each piece, as in GGUF files."""
    tests = ((model.IsControl, CONTROL), (model.IsUnknown, UNKNOWN), (model.IsByte, BYTE))
    return [
        next((kind for test, kind in tests if test(token_id)), NORMAL)
        for token_id in range(len(model))
    ]


def llama_tokenizer_json(
    model: SentencePieceProcessor, path: Path, *, legacy: bool = True, extra: Sequence[str] = ()
) -> Path:
    """Writes what transformers' LlamaConverter makes of a SentencePiece model.

    Args:
        model: the model.
        path: where to write it.
        legacy: as in transformers: whether each text between control tokens begins with a space, or
            only a text at the start of a prompt.
        extra: the names of control tokens that a fine-tuning added.
    """
    names = [model.IdToPiece(token_id) for token_id in range(len(model))]
    ids = {name: token_id for token_id, name in enumerate(names)}
    added = [*(name for name in names if model.IsControl(ids[name])), "<unk>", *extra]
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(name, ids.get(name, len(names) + index - len(added) + len(extra)))
            for index, name in enumerate(added)
        ],
        "normalizer": _legacy_normalizer() if legacy else None,
        "pre_tokenizer": None if legacy else _metaspace(),
        "post_processor": bos_template("<s>", ids["<s>"]),
        "decoder": _llama_decoder(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(names, [model.GetScore(token_id) for token_id in range(len(model))]),
        },
    }
    path.write_text(json.dumps(description))
    return path


def added_token(name: str, token_id: int, **changes: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": True, **changes}


def bos_template(name: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a token in front of a text."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }


def _legacy_normalizer() -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}


def _metaspace() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def _llama_decoder() -> dict[str, Any]:
    return {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }


def _merges(names: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best first, as transformers generates them."""
    ids = {name: token_id for token_id, name in enumerate(names)}
    merges = [
        (scores[token_id], name[:split], name[split:])
        for token_id, name in enumerate(names)
        for split in range(1, len(name))
        if name[:split] in ids and name[split:] in ids
    ]
    merges.sort(key=lambda each: -each[0])
    return [(left, right) for _, left, right in merges]


def llama_gguf(
    model: SentencePieceProcessor, path: Path, count: int | None = None, **metadata: Any
) -> Path:
    """Writes the first pieces of a SentencePiece model as llama.cpp's converter does."""
    pieces = range(len(model) if count is None else count)
    return write_gguf(
        path,
        model="llama",
        pre="default",
        tokens=[model.IdToPiece(token_id) for token_id in pieces],
        scores=[model.GetScore(token_id) for token_id in pieces],
        token_type=sentencepiece_kinds(model)[: len(pieces)],
        bos_token_id=model.bos_id(),
        eos_token_id=model.eos_id(),
        unknown_token_id=model.unk_id(),
        **metadata,
    )


def byte_level_gguf(description: dict[str, Any], pre: str, path: Path, **metadata: Any) -> Path:
    """Writes the vocabulary of a byte-level tokenizer.json."""
    ids = description["model"]["vocab"] | {
        each["content"]: each["id"] for each in description["added_tokens"]
    }
    kinds = {
        each["content"]: CONTROL if each["special"] else USER_DEFINED
        for each in description["added_tokens"]
    }
    tokens = sorted(ids, key=lambda name: ids[name])
    return write_gguf(
        path,
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_type=[kinds.get(name, NORMAL) for name in tokens],
        merges=[" ".join(pair) for pair in description["model"]["merges"]],
        **metadata,
    )


def write_gguf(path: Path, chat_template: str = "", **values: Any) -> Path:
    """A GGUF file without tensors, with these values below tokenizer.ggml."""
    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        match value:
            case bool():
                writer.add_bool(f"tokenizer.ggml.{key}", value)
            case int():
                writer.add_uint32(f"tokenizer.ggml.{key}", value)
            case str():
                writer.add_string(f"tokenizer.ggml.{key}", value)
            case _:
                writer.add_array(f"tokenizer.ggml.{key}", value)
    if chat_template:
        writer.add_chat_template(chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
