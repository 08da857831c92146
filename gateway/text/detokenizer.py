"""Token ids to text as they are made, from the vocabulary alone: no call per token. Deltas hold
whole characters, and joined they equal the `decode` of all ids by the model's library.

SentencePiece decodes a run of byte pieces as UTF-8 with one U+FFFD for *each* byte that is part of
no character, and any other piece, even a control token, ends the run. In a vocabulary of byte-level
byte-pair encoding all pieces are bytes, control tokens add none, and each maximal part of a broken
character becomes one U+FFFD, as in `tokenizers`.
"""

import codecs
from collections.abc import Iterable

from gateway.text.vocabulary import Vocabulary, broken_bytes

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence; O(1) per token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = _Utf8Decoder(errors=broken_bytes(byte_level=vocabulary.byte_level))
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
