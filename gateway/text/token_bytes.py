"""The exact bytes of tokens, where the text of a `Detokenizer` has whole characters."""

from gateway.text.vocabulary import Vocabulary


class TokenBytes:
    """The bytes that each token of a sequence adds to its text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._at_start = True

    def push(self, token_id: int) -> bytes:
        """The bytes that the next token adds."""
        inner_text = self._vocabulary.inner_texts[token_id]
        if inner_text is None or not self._at_start:
            self._at_start = False
            return self._vocabulary.pieces[token_id]
        # Control tokens leave no text, so the piece after them is still the first.
        self._at_start = not inner_text
        return self._vocabulary.lone_texts[token_id].encode()
