"""The text and control tokens around the messages of a format, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from llama.prompt_format.dialog import Segment, Turn


class Control(str):
    """The name of a control token. Text never becomes its id, however it is written."""

    __slots__ = ()


Marks = tuple[str, ...]
"""Texts and control tokens in a row."""


class SystemPlace(Enum):
    """The place of the system message in a prompt."""

    OWN = "a message of its own, at the beginning"
    FIRST_USER = "in front of the first user's message, within its marks"
    LAST_USER = "in front of the last user's message, within its marks"


class Strip(Enum):
    """The messages that lose the white space at their ends."""

    NONE = "none"
    ANSWERS = "the answers"
    TURNS = "the answers and the user's"
    ALL = "all, the system message too"


@dataclass(frozen=True, slots=True)
class MarkedTurns:
    """Writes the turns of a dialog, each message between the marks of its role.

    The marks after an answer begin with a control token and are written with the next turn, so the
    ids of a turn do not depend on those of the turn before it.
    """

    before_user: Marks
    after_user: Marks  # before an answer, too: how a prompt ends
    after_answer: Marks
    begin: Marks = ()  # of the prompt
    before_system: Marks = ()
    after_system: Marks = ()
    system_place: SystemPlace = SystemPlace.OWN
    default_system: str | None = None  # of a dialog without a system message
    before_answer: str = ""  # in a finished turn only
    strip: Strip = Strip.NONE
    bos: bool = False  # the tokenizer's own BOS, if it has one, in front of the prompt

    def __call__(self, turn: Turn) -> tuple[Segment, ...]:
        """The segments of a turn; adjacent texts are one segment."""
        parts = [*(self.begin if turn.first else self.after_answer)]
        parts += self._messages(turn)
        parts += self.after_user
        if turn.answer is not None:
            answer = turn.answer if self.strip is Strip.NONE else turn.answer.strip()
            parts += (self.before_answer, answer)
        first, *others = _segments(parts)
        if self.bos and turn.first:
            first = Segment(first.text, bos=True, control_token=first.control_token)
        return (first, *others)

    def _messages(self, turn: Turn) -> Marks:
        """The user's message, with the system message where its place is in this turn."""
        user = turn.user.strip() if self.strip in {Strip.TURNS, Strip.ALL} else turn.user
        system = self.default_system if turn.system is None else turn.system
        inside = (*self.before_user, user)
        if system is None:
            return inside
        if self.strip is Strip.ALL:
            system = system.strip()
        match self.system_place:
            case SystemPlace.OWN if turn.first:
                return (*self.before_system, system, *self.after_system, *inside)
            case SystemPlace.FIRST_USER if turn.first:
                return (*self.before_user, f"{system}\n\n{user}")
            case SystemPlace.LAST_USER if turn.answer is None:
                return (*self.before_user, f"{system}\n\n{user}")
        return inside


def _segments(parts: Sequence[str]) -> list[Segment]:
    """A segment for each control token, with the text up to the next one."""
    segments, control_token, text = [], "", ""
    for part in parts:
        if not isinstance(part, Control):
            text += part
            continue
        if text or control_token:
            segments.append(Segment(text, control_token=control_token))
        control_token, text = str(part), ""
    return [*segments, Segment(text, control_token=control_token)]
