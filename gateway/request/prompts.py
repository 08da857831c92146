"""Encodes dialogs and texts to prompts, token ids within the context length.

Text that cannot fit is not encoded: its bytes divided by those of the longest token are a lower
bound of its tokens. If that is too much already, the request is refused, or the dialog loses turns,
before the tokenizer service is called. The rest of a request is encoded in one call of `encode`.
Only a dialog that must lose turns may need more calls, where its format writes the turn that comes
first in another way than those behind it, as Llama 2's does with a system message.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama.prompt_format.dialog import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    Segment,
    drop_oldest_turns,
)
from llama.prompt_format.formats import LLAMA2, PromptFormat, TurnSegments
from serving import request_rules
from serving.errors import Violation, invalid_argument
from serving.intake.time_slice import TimeSlice

Encode = Callable[[Sequence[Segment]], Awaitable[Sequence[Sequence[int]]]]

# Probes by estimate in the search for the first turn to keep, before it continues by bisection.
_ESTIMATES = 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of a prompt, and how many turns its dialog lost."""

    ids: list[int]
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The context that a prompt must fit."""

    length: int
    # The most bytes of text that one token stands for; None: unbounded.
    max_token_bytes: int | None = None
    # Whether the tokenizer has a BOS for `Segment.bos`.
    has_bos: bool = True

    def answer_room(self, max_gen_len: int) -> int:
        """Tokens to keep free for an answer of at most `max_gen_len` when turns are dropped."""
        return min(max_gen_len, self.length // 4)

    def least_tokens(self, size: "Size") -> int:
        """A lower bound of the tokens of segments with this size together."""
        if self.max_token_bytes is None:
            return size.control_tokens
        return size.control_tokens - (-size.bytes // self.max_token_bytes)

    def size(self, segments: Sequence[Segment]) -> "Size":
        return Size(
            sum(len(each.text.encode()) for each in segments),
            sum(
                (each.bos and self.has_bos) + each.eos + bool(each.control_token)
                for each in segments
            ),
        )


@dataclass(frozen=True, slots=True)
class Size:
    """The size of segments, or the difference of two."""

    bytes: int  # of the texts
    control_tokens: int

    def plus(self, other: "Size") -> "Size":
        return Size(self.bytes + other.bytes, self.control_tokens + other.control_tokens)

    def minus(self, other: "Size") -> "Size":
        return Size(self.bytes - other.bytes, self.control_tokens - other.control_tokens)


async def encode_dialogs(
    dialogs: Mapping[str, Sequence[Message]],
    encode: Encode,
    window: Window,
    *,
    answer_room: int | None = None,
    prompt_format: PromptFormat = LLAMA2,
) -> list[Prompt]:
    """The prompts of dialogs, given by their field paths.

    With `answer_room`, each dialog loses just enough of its oldest turns to leave that many tokens
    free, never its last one. INVALID_ARGUMENT names each dialog that exceeds the context length.
    """
    drafts, time_slice = [], TimeSlice()
    for messages in dialogs.values():
        drafts.append(_Draft.of_dialog(messages, prompt_format, window, answer_room))
        await time_slice.yield_if_over()
    _require_room(dialogs, drafts, window)
    await _encode_all(drafts, encode)
    for draft, messages in zip(drafts, dialogs.values(), strict=True):
        if answer_room is not None and draft.tokens > window.length - answer_room:
            await _TurnDropper(draft, messages, prompt_format, encode).drop(
                window.length - answer_room
            )
    _require_room(dialogs, drafts, window)
    return [draft.prompt() for draft in drafts]


async def encode_texts(texts: Mapping[str, str], encode: Encode, window: Window) -> list[Prompt]:
    """The prompts of texts, given by their field paths; INVALID_ARGUMENT as for dialogs."""
    drafts = [_Draft.of_text(text, window) for text in texts.values()]
    _require_room(texts, drafts, window)
    await _encode_all(drafts, encode)
    _require_room(texts, drafts, window)
    return [draft.prompt() for draft in drafts]


def too_long(path: str, tokens: int | str, window: Window, dropped_turns: int = 0) -> Violation:
    """The violation of a prompt that does not fit; `tokens` is how many it has."""
    rule = request_rules.too_long(tokens, window.length)
    if dropped_turns:
        rule += f" ({dropped_turns} oldest turns dropped)"
    return Violation(path, rule)


@dataclass(slots=True)
class _Draft:
    """A prompt in the making: the segments of its turns and, once they are encoded, their ids."""

    turns: list[TurnSegments]
    least_tokens: int
    dropped_turns: int = 0
    ids: list[list[Sequence[int]]] = field(default_factory=list)

    @classmethod
    def of_text(cls, text: str, window: Window) -> "_Draft":
        turn = (Segment(text, bos=True),)
        return cls([turn], window.least_tokens(window.size(turn)))

    @classmethod
    def of_dialog(
        cls,
        messages: Sequence[Message],
        prompt_format: PromptFormat,
        window: Window,
        answer_room: int | None,
    ) -> "_Draft":
        """With `answer_room`, leaves out the oldest turns that certainly do not fit."""
        turns = prompt_format.render(messages)
        sizes = [*map(window.size, turns)]
        least = [*map(window.least_tokens, sizes)]
        if answer_room is None or sum(least) <= window.length - answer_room or len(turns) == 1:
            return cls(turns, sum(least))
        # tails[i]: the lower bound of the turns behind turn i.
        tails = [*itertools.accumulate(reversed(least), initial=0)][-2::-1]
        added = _first_turn_adds(prompt_format, messages, window)

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
        return sum(map(_count, self.ids))

    def prompt(self) -> Prompt:
        segments = itertools.chain.from_iterable(self.ids)
        return Prompt([*itertools.chain.from_iterable(segments)], self.dropped_turns)


def _first_turn_adds(
    prompt_format: PromptFormat, messages: Sequence[Message], window: Window
) -> Size:
    """The size that a turn has at least more if it is the first, with the system message.

    Measured on an empty turn, because a format may strip a longer one of less.
    """
    system = [each for each in messages[:1] if each.role == SYSTEM]
    empty = [Message(USER, ""), Message(ASSISTANT, "")]
    first, later = prompt_format.render([*system, *empty, *empty])
    return window.size(first).minus(window.size(later))


async def _encode_all(drafts: Sequence[_Draft], encode: Encode) -> None:
    if not drafts:
        return
    segments = [*itertools.chain.from_iterable(draft.segments for draft in drafts)]
    encoded = iter(await encode(segments))
    for draft in drafts:
        draft.ids = [[*itertools.islice(encoded, len(turn))] for turn in draft.turns]


class _TurnDropper:
    """Drops the oldest turns of an encoded dialog."""

    def __init__(
        self,
        draft: _Draft,
        messages: Sequence[Message],
        prompt_format: PromptFormat,
        encode: Encode,
    ) -> None:
        self._draft = draft
        self._messages = messages
        self._format = prompt_format
        self._encode = encode
        encoded = itertools.chain.from_iterable(draft.ids)
        self._known = dict(zip(draft.segments, encoded, strict=True))

    async def drop(self, target: int) -> None:
        """Drops just enough turns to leave at most `target` tokens; always keeps the last."""
        draft, last = self._draft, len(self._draft.ids) - 1
        if last == 0:
            return
        counts = [*map(_count, draft.ids)]
        # tails[i]: the tokens from turn i on; the last entry is 0.
        tails = [*itertools.accumulate(reversed(counts), initial=0)][::-1]
        # Tokens that a turn has more if it is the first: estimated, then measured by each probe.
        added = self._estimate_added(counts[0])
        low, high = 1, last
        for probe in itertools.count():
            if low == high:
                break
            middle = (low + high) // 2
            if probe < _ESTIMATES:
                fitting = (i for i in range(low, high - 1) if added + tails[i] <= target)
                middle = next(fitting, high - 1)
            tokens = _count(await self._first_turn(middle))
            added = tokens - counts[middle]
            if tokens + tails[middle + 1] <= target:
                high = middle
            else:
                low = middle + 1
        draft.ids = [await self._first_turn(low), *draft.ids[low + 1 :]]
        draft.dropped_turns += low

    def _estimate_added(self, tokens: int) -> int:
        """From the bytes that the first turn, which has so many tokens, owes to being the first."""
        window = Window(0)
        added = _first_turn_adds(self._format, self._messages, window)
        return tokens * added.bytes // max(window.size(self._draft.turns[0]).bytes, 1)

    async def _first_turn(self, dropped: int) -> list[Sequence[int]]:
        """The ids of the first turn after so many further turns are dropped."""
        turn = self._format.first_turn(self._messages, self._draft.dropped_turns + dropped)
        unknown = [each for each in turn if each not in self._known]
        if unknown:
            self._known.update(zip(unknown, await self._encode(unknown), strict=True))
        return [self._known[each] for each in turn]


def _count(segments: Iterable[Sequence[int]]) -> int:
    """The tokens of segments."""
    return sum(map(len, segments))


def _require_room(paths: Iterable[str], drafts: Sequence[_Draft], window: Window) -> None:
    violations = []
    for path, draft in zip(paths, drafts, strict=True):
        if draft.ids and draft.tokens > window.length:
            violations.append(too_long(path, draft.tokens, window, draft.dropped_turns))
        elif draft.least_tokens > window.length:
            least = f"at least {draft.least_tokens}"
            violations.append(too_long(path, least, window, draft.dropped_turns))
    if violations:
        raise invalid_argument(violations)
