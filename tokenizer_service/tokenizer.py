"""Text to token ids and back, exactly as the library of the model's vocabulary does it; usable
without a server.

The model was trained on these ids, so nothing here may change the text: it is neither normalized
nor stripped, and control tokens that are written out in it stay plain text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from llama.v1.tokenizer_pb2 import PIECE_KIND_CONTROL, Piece


class TokenIdError(ValueError):
    """The id at `index` of a sequence breaks `rule`: it is not in the vocabulary."""

    def __init__(self, index: int, rule: str) -> None:
        super().__init__(f"ids[{index}]: {rule}")
        self.index = index
        self.rule = rule


class ControlTokenError(ValueError):
    """The vocabulary has no control token of this name."""


class Vocabulary(Protocol):
    """The pieces of a model and how its library applies them. Safe to use from several threads."""

    # The piece of each id, in order. An id without a piece decodes to nothing.
    pieces: list[Piece]
    # Encoding puts a space in front of a text, and decoding removes it.
    dummy_prefix: bool
    # Decoding joins the bytes of the pieces and reads them as UTF-8.
    byte_level: bool
    # The most bytes of text that one token stands for; None if there is no bound.
    max_token_bytes: int | None

    def encode(self, text: str, after: str) -> list[int]:
        """The ids of a text that is not empty, none of them of a control token.

        The text stands behind the control token `after`, or begins a prompt if that is empty.
        ValueError: the library fails on it.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of ids of the vocabulary; control tokens add none."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The control tokens that the model's files name; -1 for one that it lacks."""

    bos: int
    eos: int
    pad: int
    # All ids that end an answer, `eos` among them.
    ends: tuple[int, ...]


class Tokenizer:
    """One vocabulary with its control tokens. Safe to use from several threads."""

    def __init__(
        self, vocabulary: Vocabulary, special: SpecialIds, *, fingerprint: str, chat_template: str
    ) -> None:
        """`fingerprint` is `llama.model_files.tokenizer_fingerprint` of the vocabulary's file."""
        self._vocabulary = vocabulary
        self.fingerprint = fingerprint
        self.chat_template = chat_template
        self.n_words = len(vocabulary.pieces)
        self.bos_id = special.bos  # -1 if the tokenizer puts none in front of a text
        self.eos_id = special.eos
        self.eos_ids = special.ends
        self.pad_id = special.pad  # -1 if the model has none, like Llama 2
        self.dummy_prefix = vocabulary.dummy_prefix
        self.byte_level = vocabulary.byte_level
        self.max_token_bytes = vocabulary.max_token_bytes

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        """The ids of the control tokens by their names."""
        return {
            piece.name: token_id
            for token_id, piece in enumerate(self._vocabulary.pieces)
            if piece.kind == PIECE_KIND_CONTROL and piece.name
        }

    def encode(self, s: str, bos: bool, eos: bool, control_token: str = "") -> list[int]:
        """The ids of `s`, with `bos_id` in front and `eos_id` at the end if asked for.

        The id of a `control_token` follows that of `bos`; `s` is then text in the middle of a
        prompt.

        Raises:
            ValueError: `s` holds a lone surrogate, which is not unicode and has no ids, or the
                library fails on it.
            ControlTokenError: there is no `control_token` of this name.
        """
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} is the lone surrogate U+{ord(s[error.start]):04X}, "
                "which is not valid unicode"
            ) from error
        ids = [self.bos_id] if bos and self.bos_id >= 0 else []
        if control_token:
            ids.append(self._control_id(control_token))
        if s:
            ids += self._vocabulary.encode(s, control_token)
        return [*ids, self.eos_id] if eos else ids

    def _control_id(self, name: str) -> int:
        try:
            return self.control_ids[name]
        except KeyError:
            raise ControlTokenError(
                f"the model's vocabulary has no control token {name[:64]!r}"
            ) from None

    def decode(self, ids: Sequence[int] | int) -> str:
        """The text of `ids`, or of a single id; TokenIdError if one is unknown."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < self.n_words:
                rule = f"must be from 0 to {self.n_words - 1}, got {token_id}"
                raise TokenIdError(index, rule)
        return self._vocabulary.decode(ids)

    def vocabulary(self) -> list[Piece]:
        """The pieces of text that the ids stand for, in order."""
        return list(self._vocabulary.pieces)
