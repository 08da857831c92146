"""A vocabulary of byte-pair encoding, as a tokenizer.json describes it, run by `tokenizers`.

There are two kinds: pieces of bytes (GPT-2, Llama 3), and pieces of characters with one more piece
for each byte, as in what transformers makes of Llama 2's SentencePiece model.

No text has the ids of control tokens. `tokenizers` finds its special tokens in every text, so it is
not told of them: they are taken from its list, their entries in its model get names that no text
can form, and merges that lead to them are left out.
"""

import re
import reprlib
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from llama.v1.tokenizer_pb2 import (
    PIECE_KIND_BYTE,
    PIECE_KIND_CONTROL,
    PIECE_KIND_NORMAL,
    PIECE_KIND_UNKNOWN,
    Piece,
)
from tokenizer_service.vocabularies import byte_alphabet, sentencepiece_proto, stages
from tokenizer_service.vocabularies.control_names import is_control_name
from tokenizer_service.vocabularies.library_encoder import LibraryEncoder, LibraryError
from tokenizer_service.vocabularies.sentencepiece_model import SPACE_SYMBOL, SentencePieceVocabulary

Description = Mapping[str, Any]

# Unicode's White_Space, which `rstrip` of a token means; that of `str.isspace` differs.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
MAX_TOKENS = 2**22
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")
# In front of the names that no text may form: no merge makes them, and they cannot be guessed.
_UNREACHABLE = f"\uffff{secrets.token_hex(8)}"


class BytePairVocabulary:
    """The vocabulary of a tokenizer.json. Its tokenizer may be used from several threads."""

    def __init__(self, description: Description, control_ids: Collection[int] = ()) -> None:
        """From the object in a tokenizer.json, or raises ValueError with what is wrong in it.

        `control_ids` are those of control tokens that it may list as ordinary ones.
        """
        self.ids = token_ids(description)
        model = description["model"]
        added = description.get("added_tokens") or []
        self.byte_level = stages.find(description.get("decoder"), "ByteLevel") is not None
        unknown = None if self.byte_level else model.get("unk_token")
        special = {each["content"] for each in added if each.get("special")}
        self._control = self._control_names(special, control_ids) - {unknown}
        self._strips_after = {
            each["content"]
            for each in added
            if each["content"] in self._control and each.get("rstrip")
        }
        self.pieces = self._pieces(unknown)
        self.dummy_prefix = not self.byte_level and _strips_first_space(description["decoder"])
        texts = [each for each in added if each["content"] not in self._control | {unknown}]
        self._encoder = self._load(description, texts, description.get("pre_tokenizer"))
        middle = stages.for_middle_of_prompt(description.get("pre_tokenizer"))
        self._middle_encoder = (
            self._encoder
            if middle == description.get("pre_tokenizer")
            else self._load(description, texts, middle)
        )
        self._decoder = None if self.byte_level else self._sentencepiece(unknown)
        self.max_token_bytes = (
            self._max_token_bytes() if self._keeps_text(description, texts) else None
        )

    def encode(self, text: str, after: str) -> list[int]:
        """The ids of a text, or a ValueError if the library fails on it.

        White space behind a control token belongs to it if the file says so (`rstrip`).
        """
        if after in self._strips_after:
            text = text.lstrip(_WHITE_SPACE)
        encoder = self._middle_encoder if after else self._encoder
        try:
            return encoder.encode(text)
        except LibraryError as error:
            raise ValueError(f"the model's tokenizer cannot encode it: {error}") from error

    def decode(self, ids: list[int]) -> str:
        if self._decoder is not None:
            return self._decoder.decode(ids)
        pieces = self.pieces
        return b"".join(pieces[each].bytes for each in ids).decode(errors="replace")

    def _control_names(self, special: Collection[str], control_ids: Collection[int]) -> set[str]:
        """The names of control tokens: all names of an id of which one is.

        The piece of a single byte is always text, which would have no ids without it. Some models
        take "!" for padding.
        """
        is_byte = byte_alphabet.CHARACTERS.__contains__ if self.byte_level else _BYTE_NAME.fullmatch
        controls = {
            token_id
            for name, token_id in self.ids.items()
            if (name in special or token_id in control_ids or is_control_name(name))
            and not is_byte(name)
        }
        return {
            name
            for name, token_id in self.ids.items()
            if token_id in controls and not is_byte(name)
        }

    def _pieces(self, unknown: str | None) -> list[Piece]:
        # An id that the file does not use decodes to nothing, and has no name.
        pieces = [Piece(kind=PIECE_KIND_CONTROL)] * (max(self.ids.values()) + 1)
        for name, token_id in self.ids.items():
            pieces[token_id] = self._piece(name, unknown)
        return pieces

    def _piece(self, name: str, unknown: str | None) -> Piece:
        if name in self._control:
            return Piece(kind=PIECE_KIND_CONTROL, name=name)
        if self.byte_level:
            return Piece(bytes=byte_alphabet.piece_bytes(name), kind=PIECE_KIND_NORMAL)
        if name == unknown:
            return Piece(bytes=" \u2047 ".encode(), kind=PIECE_KIND_UNKNOWN)  # SentencePiece's
        if byte := _BYTE_NAME.fullmatch(name):
            return Piece(bytes=bytes.fromhex(byte[1]), kind=PIECE_KIND_BYTE)
        return Piece(bytes=name.replace(SPACE_SYMBOL, " ").encode(), kind=PIECE_KIND_NORMAL)

    def _load(
        self, description: Description, texts: list[Any], pre_tokenizer: Description | None
    ) -> LibraryEncoder:
        """The tokenizer of texts alone; `texts` are the added tokens that are none of control."""
        model = description["model"]
        unreachable = self._control | {model.get("unk_token")}
        vocab = {
            _UNREACHABLE + name if name in self._control else name: token_id
            for name, token_id in model["vocab"].items()
        }
        merges = [_pair(each) for each in model["merges"]]
        unknown = model.get("unk_token")
        without_control = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": texts,
            "normalizer": description.get("normalizer"),
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": None,
            "model": model
            | {
                "type": "BPE",
                "dropout": None,
                "unk_token": None if unknown in self._control else unknown,
                # An added token keeps the id under which the model has it.
                "vocab": vocab | {each["content"]: each["id"] for each in texts},
                "merges": [
                    (left, right)
                    for left, right in merges
                    if unreachable.isdisjoint((left, right, left + right))
                ],
            },
        }
        try:
            return LibraryEncoder(without_control)
        except LibraryError as error:
            raise ValueError(f"the library `tokenizers` cannot read it: {error}") from error

    def _sentencepiece(self, unknown: str | None) -> SentencePieceVocabulary:
        """The same pieces as a SentencePiece model, for its rules of decoding."""
        kinds = {
            PIECE_KIND_CONTROL: sentencepiece_proto.CONTROL,
            PIECE_KIND_BYTE: sentencepiece_proto.BYTE,
            PIECE_KIND_UNKNOWN: sentencepiece_proto.UNKNOWN,
        }
        names = {token_id: name for name, token_id in self.ids.items()}
        pieces = [
            (
                names.get(token_id, f"{_UNREACHABLE}{token_id}"),
                0.0,
                kinds.get(piece.kind, sentencepiece_proto.NORMAL),
            )
            for token_id, piece in enumerate(self.pieces)
        ]
        if unknown is None:  # SentencePiece needs one
            pieces.append((f"{_UNREACHABLE}unknown", 0.0, sentencepiece_proto.UNKNOWN))
        return SentencePieceVocabulary(
            sentencepiece_proto.serialize_model(pieces, dummy_prefix=self.dummy_prefix)
        )

    def _keeps_text(self, description: Description, texts: list[Any]) -> bool:
        """Whether no part of a text is without a token."""
        if any(each.get("lstrip") or each.get("rstrip") for each in texts):
            return False  # such a token stands for any amount of white space, too
        # Without an unknown token, a byte that has no piece is left out.
        complete = not self.byte_level or byte_alphabet.CHARACTERS.keys() <= self.ids.keys()
        return complete and stages.keeps_text(description)

    def _max_token_bytes(self) -> int:
        """The symbol for a space counts three bytes, because it also stands for itself."""
        sizes = (
            len(self._piece(name, None).bytes) if self.byte_level else len(name.encode())
            for name, token_id in self.ids.items()
            if self.pieces[token_id].kind == PIECE_KIND_NORMAL
        )
        return max(sizes, default=1)


def token_ids(description: Description) -> dict[str, int]:
    """The ids of the tokens by their names, or a ValueError."""
    _check(description)
    added = description.get("added_tokens") or []
    for each in added:
        if not isinstance(each, dict) or not isinstance(each.get("content"), str):
            raise ValueError(f"its added token {reprlib.repr(each)} has no text as content")
        if not each["content"]:
            raise ValueError("it has an added token whose content is empty")
    ids: dict[str, int] = description["model"]["vocab"] | {
        each["content"]: each.get("id") for each in added
    }
    _check_ids(ids)
    return ids


def _check(description: Description) -> None:
    model = description.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ValueError(
            f"its model is of the type {kind}, and only BPE is supported; if the checkpoint came "
            "with a tokenizer.model, use that"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its pieces have prefixes or suffixes that are no text")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError("its model has no vocab or no merges")
    if not model["vocab"]:
        raise ValueError("its vocab is empty")
    decoder = description.get("decoder")
    if stages.find(decoder, "ByteLevel"):
        if not (
            stages.find(description.get("pre_tokenizer"), "ByteLevel")
            or stages.find(description.get("normalizer"), "ByteLevel")
        ):
            raise ValueError("its decoder is ByteLevel, but it does not encode bytes")
        return
    if not (stages.find(decoder, "ByteFallback") or stages.find(decoder, "Metaspace")):
        raise ValueError("its decoder is neither ByteLevel nor that of a SentencePiece model")
    bytes_missing = {f"<0x{byte:02X}>" for byte in range(256)} - model["vocab"].keys()
    if bytes_missing or not model.get("byte_fallback"):
        raise ValueError("it lacks pieces for bytes (byte_fallback), so some text has no ids")


def _check_ids(ids: Mapping[str, int]) -> None:
    """Every id needs an entry in a table, so a damaged one must not make it huge."""
    for name, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
            raise ValueError(f"the id of {name[:64]!r} must be from 0 to {MAX_TOKENS - 1}")


def _strips_first_space(decoder: Description) -> bool:
    if metaspace := stages.find(decoder, "Metaspace"):
        return stages.prepends(metaspace)
    strip = stages.find(decoder, "Strip")
    return strip is not None and strip.get("content") == " " and strip.get("start") == 1


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """The two parts of a merge; they are one string in files of older versions."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    match parts:
        case [str(left), str(right)]:
            return left, right
    raise ValueError(f"its merge {reprlib.repr(merge)} is not one of two tokens")
