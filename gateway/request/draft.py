"""A prompt in the making, from its segments to its token ids."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.request.window import Size, Window
from llama.prompt_format.dialog import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    Segment,
    drop_oldest_turns,
)
from llama.prompt_format.formats import PromptFormat, TurnSegments


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of a prompt, and how many turns its dialog lost."""

    ids: list[int]
    dropped_turns: int = 0
    scored_from: int = 0  # where the model begins to report the prompt's tokens, if it does


@dataclass(slots=True)
class Draft:
    """A prompt in the making: the segments of its turns and, once they are encoded, their ids."""

    turns: list[TurnSegments]
    least_tokens: int
    dropped_turns: int = 0
    ids: list[list[Sequence[int]]] = field(default_factory=list)

    @classmethod
    def of_text(cls, text: str, window: Window) -> "Draft":
        turn = (Segment(text, bos=True),)
        return cls([turn], window.least_tokens(window.size(turn)))

    @classmethod
    def of_dialog(
        cls,
        messages: Sequence[Message],
        prompt_format: PromptFormat,
        window: Window,
        answer_room: int | None,
    ) -> "Draft":
        """With `answer_room`, leaves out the oldest turns that certainly do not fit."""
        turns = prompt_format.render(messages)
        sizes = [*map(window.size, turns)]
        least = [*map(window.least_tokens, sizes)]
        if answer_room is None or sum(least) <= window.length - answer_room or len(turns) == 1:
            return cls(turns, sum(least))
        # tails[i]: the lower bound of the turns behind turn i.
        tails = [*itertools.accumulate(reversed(least), initial=0)][-2::-1]
        added = first_turn_adds(prompt_format, messages, window)

        def total(first: int) -> int:
            """The lower bound of a prompt that begins with this turn."""
            return window.least_tokens(sizes[first].plus(added)) + tails[first]

        last = len(turns) - 1
        fitting = (i for i in range(1, last) if total(i) <= window.length - answer_room)
        dropped = next(fitting, last)
        kept = prompt_format.render(drop_oldest_turns(messages, dropped))
        return cls(kept, total(dropped), dropped)

    @property
    def segments(self) -> Iterable[Segment]:
        return itertools.chain.from_iterable(self.turns)

    @property
    def tokens(self) -> int:
        return sum(map(token_count, self.ids))

    def prompt(self) -> Prompt:
        segments = itertools.chain.from_iterable(self.ids)
        return Prompt([*itertools.chain.from_iterable(segments)], self.dropped_turns)


def first_turn_adds(
    prompt_format: PromptFormat, messages: Sequence[Message], window: Window
) -> Size:
    """The size that a turn has at least more if it is the first, with the system message.

    Measured on an empty turn, because a format may strip a longer one of less.
    """
    system = [each for each in messages[:1] if each.role == SYSTEM]
    empty = [Message(USER, ""), Message(ASSISTANT, "")]
    first, later = prompt_format.render([*system, *empty, *empty])
    return window.size(first).minus(window.size(later))


def token_count(segments: Iterable[Sequence[int]]) -> int:
    """The tokens of segments."""
    return sum(map(len, segments))
