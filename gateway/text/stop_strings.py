"""Stop strings across token borders: text is held back while it could still begin one. The string
that is *completed* first ends the text (of two completed by the same character the longer one), so
that the outcome depends on the characters alone and not on how tokens cut them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopString:
    """A string and, for each prefix, the length of its longest border (Knuth, Morris, Pratt)."""

    text: str
    borders: tuple[int, ...]

    @classmethod
    def compile(cls, text: str) -> "StopString":
        borders = [0]
        for character in text[1:]:
            length = borders[-1]
            while length and text[length] != character:
                length = borders[length - 1]
            borders.append(length + (text[length] == character))
        return cls(text, tuple(borders))

    def advance(self, matched: int, character: str) -> int:
        """The length matched after one more character; `matched`, before it, is not all."""
        while matched and self.text[matched] != character:
            matched = self.borders[matched - 1]
        return matched + (self.text[matched] == character)


class StopFilter:
    """Passes on the text of one sequence, up to the first stop string."""

    def __init__(self, stops: Sequence[StopString]) -> None:
        self._stops = stops
        self._matched = [0] * len(stops)
        self._held = ""
        self.stop_string = ""  # the one that ended the text

    @property
    def found(self) -> bool:
        return bool(self.stop_string)

    def push(self, text: str) -> str:
        """The text that is certain now; `found` tells whether it ends before a stop string."""
        if not self._stops:
            return text
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._matched = [
                stop.advance(matched, character)
                for stop, matched in zip(self._stops, self._matched, strict=True)
            ]
            complete = [
                stop.text
                for stop, matched in zip(self._stops, self._matched, strict=True)
                if matched == len(stop.text)
            ]
            if complete:
                self.stop_string, self._held = max(complete, key=len), ""
                return pending[: end - len(self.stop_string)]
        certain = len(pending) - max(self._matched)
        self._held = pending[certain:]
        return pending[:certain]

    def finish(self) -> str:
        """The text that is still held back; call it at the end of the text."""
        held, self._held = self._held, ""
        return held
