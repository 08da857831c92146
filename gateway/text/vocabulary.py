"""The vocabulary of the served model: the bytes and texts of each token id."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from llama.model_files import max_embedding_rows

_REPLACE_EACH_BYTE = "gateway.replace_each_byte"
# The codec's own "replace" puts one U+FFFD for several bytes of a truncated character.
codecs.register_error(_REPLACE_EACH_BYTE, lambda error: ("\ufffd", _next_byte(error)))


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
    # The id that the tokenizer puts in front of a text; None where it puts none.
    bos_id: int | None
    # All ids that end an answer, the one that ends a text first.
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
        bos_id: int | None = None,
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
        table += [(b"", PieceKind.CONTROL)] * (max_embedding_rows(size) - size)
        errors = broken_bytes(byte_level=byte_level)
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
            bos_id=bos_id,
            eos_ids=tuple(eos_ids),
            byte_level=byte_level,
            control_ids=MappingProxyType(dict(control_ids)),
            chat_template=chat_template,
            max_token_bytes=max_token_bytes,
            mean_token_bytes=sum(len(piece) for piece, _ in table) / max(size, 1),
        )

    def __len__(self) -> int:
        return self.size


def broken_bytes(*, byte_level: bool) -> str:
    """How bytes that are no character are decoded, as the name of an error handler."""
    return "replace" if byte_level else _REPLACE_EACH_BYTE
