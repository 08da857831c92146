"""Word wrap for text that is streamed to a terminal.

A terminal breaks a line wherever it is full. Here a word that does not fit is erased and written
again on the next line. The rest of its line is filled with spaces, so that the terminal itself
breaks the line: text copied from there has no line break that the model did not write.
"""

import unicodedata
from collections.abc import Callable

# Narrower terminals break lines by themselves.
_MIN_COLUMNS = 20
_TAB = 8


class WordWrap:
    """Wraps successive pieces of a text that starts at the beginning of a line.

    `columns` returns the current width of the terminal.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._width = columns
        self._columns = 0
        self._column = 0  # cells in use; when they fill the line, the next one breaks it
        # The unfinished word, of characters that are one cell wide (only the terminal knows the
        # width of others), or None if it cannot be erased.
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
        # Letters after a wide character cannot be erased: filling the rest of the line would add a
        # space that the model did not write.
        narrow = cells == 1 or unicodedata.combining(character)
        self._word = self._word + character if narrow and self._word is not None else None
        return character

    def _on_the_next_line(self, character: str) -> str:
        """Moves the unfinished word and its next character, which do not fit, to the next line."""
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
        if self._column + cells > self._columns:  # the terminal breaks the line before it
            self._column = 0
        self._column += cells


def _cells(character: str) -> int:
    """The width of a character in terminal columns."""
    if unicodedata.category(character) in {"Mn", "Me", "Cf", "Cc"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1
