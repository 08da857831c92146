"""Text to token ids and back, exactly as SentencePiece does it; usable without a server.

The model was trained on these ids, so this module must not change the text: it neither normalizes
nor strips it, and control tokens that are written out in it stay plain text.
"""

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from sentencepiece import SentencePieceProcessor

from llama.v1.tokenizer_pb2 import (
    PIECE_KIND_BYTE,
    PIECE_KIND_CONTROL,
    PIECE_KIND_NORMAL,
    PIECE_KIND_UNKNOWN,
    Piece,
)

# Field numbers of sentencepiece_model.proto, whose generated code needs another protobuf version.
_NORMALIZER_SPEC, _CHARSMAP, _REMOVE_EXTRA_WHITESPACES = 3, 2, 4

SPACE_SYMBOL = "\u2581"  # stands for a space inside of a piece


class TokenizerFileError(ValueError):
    """The model file cannot be used. The message names the file and the fix."""


class TokenIdError(ValueError):
    """The id at `index` of a sequence breaks `rule`: it is not in the vocabulary."""

    def __init__(self, index: int, rule: str) -> None:
        super().__init__(f"ids[{index}]: {rule}")
        self.index = index
        self.rule = rule


class Tokenizer:
    """One SentencePiece model. Safe to use from several threads."""

    def __init__(self, model_path: str | PathLike[str]) -> None:
        """Reads the model file, Llama 2's `tokenizer.model`, or raises `TokenizerFileError`."""
        try:
            model = Path(model_path).read_bytes()
        except OSError as error:
            raise TokenizerFileError(
                f"cannot read {model_path}: {error.strerror}; tokenizer_path must name the "
                "tokenizer.model that came with the checkpoint"
            ) from error
        self._processor = _load(model, model_path)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.n_words: int = self._processor.GetPieceSize()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()  # -1 if the model has none, like Llama 2
        # Encoding puts a space in front of every text, and decoding removes it.
        self.dummy_prefix = self._processor.Normalize("a") == SPACE_SYMBOL + "a"
        self._keeps_text = _keeps_text(model)

    @property
    def max_token_bytes(self) -> int | None:
        """The most bytes of text that one token stands for; None if there is no bound.

        The symbol for a space counts three bytes, because it also stands for itself.
        """
        # Without byte pieces, an unknown token stands for a run of characters of any length.
        ids = range(self.n_words)
        if not self._keeps_text or not any(map(self._processor.IsByte, ids)):
            return None
        return max(
            len(self._processor.IdToPiece(token_id).encode())
            for token_id in ids
            if not (self._processor.IsControl(token_id) or self._processor.IsByte(token_id))
        )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, with `bos_id` in front and `eos_id` at the end if asked for.

        Raises:
            ValueError: `s` holds a lone surrogate, which is not unicode and has no ids.
        """
        try:
            text = s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} is the lone surrogate U+{ord(s[error.start]):04X}, "
                "which is not valid unicode"
            ) from error
        ids: list[int] = self._processor.Encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int] | int) -> str:
        """The text of `ids`, or of a single id; TokenIdError if one is unknown."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < self.n_words:
                rule = f"must be from 0 to {self.n_words - 1}, got {token_id}"
                raise TokenIdError(index, rule)
        text: str = self._processor.Decode(ids)
        return text

    def vocabulary(self) -> list[Piece]:
        """The pieces of text that the ids stand for, in order."""
        return [self._piece(token_id) for token_id in range(self.n_words)]

    def _piece(self, token_id: int) -> Piece:
        written = self._processor.IdToPiece(token_id)
        if self._processor.IsControl(token_id):
            return Piece(kind=PIECE_KIND_CONTROL)
        if self._processor.IsByte(token_id):  # written as <0x0A>
            return Piece(bytes=bytes([int(written[1:-1], 16)]), kind=PIECE_KIND_BYTE)
        if self._processor.IsUnknown(token_id):
            return Piece(bytes=self.decode(token_id).encode(), kind=PIECE_KIND_UNKNOWN)
        return Piece(bytes=written.replace(SPACE_SYMBOL, " ").encode(), kind=PIECE_KIND_NORMAL)


def _keeps_text(model: bytes) -> bool:
    """Whether the model's normalizer changes nothing in a text but spaces, to their symbol."""
    normalizer = _fields(_fields(model).get(_NORMALIZER_SPEC, b""))
    return not normalizer.get(_CHARSMAP) and not normalizer.get(_REMOVE_EXTRA_WHITESPACES, True)


def _fields(serialized: bytes) -> dict[int, Any]:
    """The fields of a message by their numbers; the last value of a repeated field."""
    fields = UnknownFieldSet(Empty.FromString(serialized))
    each = (fields[index] for index in range(len(fields)))
    return {field.field_number: field.data for field in each}


def _load(model: bytes, path: str | PathLike[str]) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise TokenizerFileError(
            f"{path} is damaged or not a SentencePiece model; use the tokenizer.model that came "
            "with the checkpoint (Llama 3's, and any tokenizer.json, are of other formats)"
        ) from error
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise TokenizerFileError(
            f"{path} is a SentencePiece model without BOS or EOS, so not one of Llama 2; use the "
            "tokenizer.model that came with the checkpoint"
        )
    return processor
