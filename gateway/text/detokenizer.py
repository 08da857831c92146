"""Converts token ids to text one by one, from the vocabulary alone: no call per token. Deltas hold
whole characters, and joined they equal SentencePiece's `decode` of all ids, so the rules are its
own: a run of byte pieces is decoded as UTF-8 with one U+FFFD for *each* byte that is part of no
character, and any other piece, even a control token, ends the run.
"""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

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
    """The texts of each token id, in three forms, precomputed."""

    pieces: tuple[bytes, ...]
    # The text that the id adds inside a text; None for a byte piece, whose text depends on its
    # neighbours.
    inner_texts: tuple[str | None, ...]
    # The text of the id on its own.
    lone_texts: tuple[str, ...]
    # Every id that ends an answer.
    eos_ids: tuple[int, ...]
    # The most bytes of text that one token stands for; None: unbounded.
    max_token_bytes: int | None = None
    mean_token_bytes: float = 0.0

    @classmethod
    def build(
        cls,
        pieces: Iterable[tuple[bytes, int]],
        *,
        dummy_prefix: bool,
        eos_id: int,
        answer_ends: Iterable[int] = (),
        max_token_bytes: int | None = None,
    ) -> "Vocabulary":
        """Builds the tables from the bytes and kind of each id.

        With `dummy_prefix` the encoder adds a space in front of a text, which is dropped again.
        `answer_ends` are ids that end an answer beside `eos_id`.
        """
        table = tuple((piece, PieceKind(kind)) for piece, kind in pieces)
        return cls(
            pieces=tuple(piece for piece, _ in table),
            inner_texts=tuple(
                None if kind is PieceKind.BYTE else piece.decode() for piece, kind in table
            ),
            lone_texts=tuple(
                piece.decode(errors=_REPLACE_EACH_BYTE).removeprefix(
                    " " if dummy_prefix and kind is PieceKind.NORMAL else ""
                )
                for piece, kind in table
            ),
            eos_ids=(*dict.fromkeys((eos_id, *answer_ends)),),
            max_token_bytes=max_token_bytes,
            mean_token_bytes=sum(len(piece) for piece, _ in table) / max(len(table), 1),
        )

    def __len__(self) -> int:
        return len(self.pieces)


class Detokenizer:
    """The text of one sequence; O(1) per token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = _Utf8Decoder(errors=_REPLACE_EACH_BYTE)
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
        """U+FFFD for each byte of an unfinished character, if there is one."""
        return self._utf8.decode(b"", final=True)


def text_of(ids: Iterable[int], vocabulary: Vocabulary) -> str:
    """The text that `ids` decode to."""
    detokenizer = Detokenizer(vocabulary)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()
