"""Token ids to text as they are made, from the vocabulary alone: no call per token. Deltas hold
whole characters, and joined they equal the `decode` of all ids by the model's library.

SentencePiece decodes a run of byte pieces as UTF-8 with one U+FFFD for *each* byte that is part of
no character, and any other piece, even a control token, ends the run. In a vocabulary of byte-level
byte-pair encoding all pieces are bytes, control tokens add none, and each maximal part of a broken
character becomes one U+FFFD, as in `tokenizers`.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from llama.model_files import MAX_PADDING

_REPLACE_EACH_BYTE = "gateway.replace_each_byte"
# The codec's own "replace" puts one U+FFFD for several bytes of a truncated character.
codecs.register_error(_REPLACE_EACH_BYTE, lambda error: ("\ufffd", _next_byte(error)))
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def _next_byte(error: UnicodeError) -> int:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.start + 1


class PieceKind(IntEnum):
    """The kind of a piece; the numbers are those of `llama.v1.PieceKind`."""

    NORMAL = 1
    CONTROL = 2
    BYTE = 3
    UNKNOWN = 4


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The texts of each token id, in three forms, precomputed.

    The model's embedding may have more rows than there are tokens. It may choose the ids of those
    rows, so the three tables have entries without a text for them.
    """

    size: int  # the number of tokens
    pieces: tuple[bytes, ...]
    # The text that the id adds inside a text; None where it depends on its neighbours, as that of a
    # byte does.
    inner_texts: tuple[str | None, ...]
    # The text of the id on its own.
    lone_texts: tuple[str, ...]
    # All ids that end an answer.
    eos_ids: tuple[int, ...]
    # The rule for the bytes of characters: that of byte-level encoding, or SentencePiece's.
    byte_level: bool
    # The ids of control tokens by their names.
    control_ids: Mapping[str, int]
    # The Jinja template of a dialog in the model's files; empty where they have none.
    chat_template: str
    # No token stands for more bytes of an encoded text; None where there is no bound.
    max_token_bytes: int | None
    mean_token_bytes: float

    @classmethod
    def build(
        cls,
        pieces: Iterable[tuple[bytes, int]],
        *,
        dummy_prefix: bool,
        eos_ids: Sequence[int],
        byte_level: bool = False,
        control_ids: Mapping[str, int] = MappingProxyType({}),
        chat_template: str = "",
        max_token_bytes: int | None = None,
    ) -> "Vocabulary":
        """From the bytes and kind of each id.

        With `dummy_prefix` a space in front of a text belongs to its encoding and is dropped.
        """
        table = [(piece, PieceKind(kind)) for piece, kind in pieces]
        size = len(table)
        table += [(b"", PieceKind.CONTROL)] * int(size * MAX_PADDING)
        errors = _broken_bytes(byte_level=byte_level)
        return cls(
            size=size,
            pieces=tuple(piece for piece, _ in table),
            inner_texts=tuple(
                None if byte_level or kind is PieceKind.BYTE else piece.decode()
                for piece, kind in table
            ),
            lone_texts=tuple(
                piece.decode(errors=errors).removeprefix(
                    " " if dummy_prefix and kind is PieceKind.NORMAL else ""
                )
                for piece, kind in table
            ),
            eos_ids=tuple(eos_ids),
            byte_level=byte_level,
            control_ids=MappingProxyType(dict(control_ids)),
            chat_template=chat_template,
            max_token_bytes=max_token_bytes,
            mean_token_bytes=sum(len(piece) for piece, _ in table) / max(size, 1),
        )

    def __len__(self) -> int:
        return self.size


def _broken_bytes(*, byte_level: bool) -> str:
    """How bytes that are no character are decoded, as the name of an error handler."""
    return "replace" if byte_level else _REPLACE_EACH_BYTE


class Detokenizer:
    """The text of one sequence; O(1) per token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = _Utf8Decoder(errors=_broken_bytes(byte_level=vocabulary.byte_level))
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty while a character lacks bytes."""
        inner_text = self._vocabulary.inner_texts[token_id]
        if inner_text is None:
            self._at_start = False
            return self._utf8.decode(self._vocabulary.pieces[token_id])
        if self._at_start:
            # Control tokens leave no text, so the piece after them is still the first.
            self._at_start = not inner_text
            return self._vocabulary.lone_texts[token_id]
        return self.finish() + inner_text

    def finish(self) -> str:
        """The text of an unfinished character that no byte follows."""
        return self._utf8.decode(b"", final=True)


def text_of(ids: Iterable[int], vocabulary: Vocabulary) -> str:
    """The text that `ids` decode to."""
    detokenizer = Detokenizer(vocabulary)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()
