"""Text that is streamed to a terminal, broken between words.

A terminal breaks a line wherever it is full. Here a word that does not fit is taken back and begun
again on the next line. The rest of its line is filled with spaces, so that the terminal breaks the
line by itself: text that is copied from there has no line break that the model did not write.
"""

import unicodedata
from collections.abc import Callable

# Narrower ones are left to break lines by themselves.
_MIN_COLUMNS = 20
_TAB = 8


class WordWrap:
    """Turns text that follows on what it turned before, from the beginning of a line on.

    `columns` gives the width of the terminal, which may change.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._width = columns
        self._columns = 0
        self._column = 0  # cells in use; as many as there are columns: the next one breaks the line
        # The unfinished word, of characters that are one cell wide (how wide others are, only the
        # terminal knows), or None if it cannot be taken back.
        self._word: str | None = ""

    def __call__(self, text: str) -> str:
        self._columns = self._width()
        return "".join(map(self._turn, text)) if self._columns >= _MIN_COLUMNS else text

    def _turn(self, character: str) -> str:
        if character in "\n\r":
            self._column, self._word = 0, ""
            return character
        if character == "\t":
            self._column = min(self._column // _TAB * _TAB + _TAB, self._columns - 1)
            self._word = ""
            return character
        if character == " ":
            self._advance(1)
            self._word = ""
            return character
        cells = _cells(character)
        if cells == 1 and self._column >= self._columns - 1:
            return self._on_the_next_line(character)
        self._advance(cells)
        # Letters behind a wide character cannot be taken back: the rest of the line would be filled
        # with a space that the model did not write.
        narrow = cells == 1 or unicodedata.combining(character)
        self._word = self._word + character if narrow and self._word is not None else None
        return character

    def _on_the_next_line(self, character: str) -> str:
        """The unfinished word and its next character, for which there is no room any more."""
        word = self._word
        length = 0 if word is None else sum(map(_cells, word))
        start = self._column - length
        if word is None or start == 0:  # longer than a line
            self._advance(1)
            self._word = None
            return character
        back = f"\x1b[{length}D" if length else ""
        self._column, self._word = length + 1, word + character
        return f"{back}{' ' * (self._columns - start)}{word}{character}"

    def _advance(self, cells: int) -> None:
        if self._column + cells > self._columns:  # the terminal breaks the line in front of it
            self._column = 0
        self._column += cells


def _cells(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.category(character) in {"Mn", "Me", "Cf", "Cc"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1
