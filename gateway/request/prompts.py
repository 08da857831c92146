"""Encodes dialogs and texts to prompts, token ids within the context length.

Text that cannot fit is not encoded: its bytes divided by those of the longest token are a lower
bound of its tokens. If that is too much already, the request is refused, or the dialog loses turns,
before the tokenizer service is called. The rest of a request is encoded in one call of `encode`.
Only a dialog with a system message that must lose turns needs more calls, because the system
message is encoded together with the turn that comes first.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama.prompt_format.dialog import Message, Segment, drop_oldest_turns, render, system_bytes
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

    def answer_room(self, max_gen_len: int) -> int:
        """Tokens to keep free for an answer of at most `max_gen_len` when turns are dropped."""
        return min(max_gen_len, self.length // 4)

    def least_tokens(self, segment: Segment, more_bytes: int = 0) -> int:
        """A lower bound of the segment's tokens, if its text had `more_bytes` more."""
        tokens = segment.bos + segment.eos
        if self.max_token_bytes is not None:
            tokens += -(-(len(segment.text.encode()) + more_bytes) // self.max_token_bytes)
        return tokens


async def encode_dialogs(
    dialogs: Mapping[str, Sequence[Message]],
    encode: Encode,
    window: Window,
    *,
    answer_room: int | None = None,
) -> list[Prompt]:
    """The prompts of dialogs, given by their field paths.

    With `answer_room`, each dialog loses just enough of its oldest turns to leave that many tokens
    free, never its last one. INVALID_ARGUMENT names each dialog that exceeds the context length.
    """
    drafts, time_slice = [], TimeSlice()
    for messages in dialogs.values():
        drafts.append(_Draft.of_dialog(messages, window, answer_room))
        await time_slice.yield_if_over()
    _require_room(dialogs, drafts, window)
    await _encode_all(drafts, encode)
    for draft, messages in zip(drafts, dialogs.values(), strict=True):
        if answer_room is not None and draft.tokens > window.length - answer_room:
            await _drop_turns(draft, messages, encode, window.length - answer_room)
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
    """A prompt in the making: its segments and, once they are encoded, their ids."""

    segments: list[Segment]
    least_tokens: int
    dropped_turns: int = 0
    ids: list[Sequence[int]] = field(default_factory=list)

    @classmethod
    def of_text(cls, text: str, window: Window) -> "_Draft":
        segment = Segment(text, bos=True, eos=False)
        return cls([segment], window.least_tokens(segment))

    @classmethod
    def of_dialog(
        cls, messages: Sequence[Message], window: Window, answer_room: int | None
    ) -> "_Draft":
        """With `answer_room`, leaves out the oldest turns that certainly do not fit."""
        segments = render(messages)
        least = [*map(window.least_tokens, segments)]
        if answer_room is None or sum(least) <= window.length - answer_room or len(segments) == 1:
            return cls(segments, sum(least))
        system = system_bytes(messages)
        # totals[i]: the lower bound of a prompt that begins with turn i, after the system message.
        tails = [*itertools.accumulate(reversed(least), initial=0)][-2::-1]
        totals = [
            window.least_tokens(segment, system) + tail
            for segment, tail in zip(segments, tails, strict=True)
        ]
        last = len(segments) - 1
        fitting = (i for i in range(1, last) if totals[i] <= window.length - answer_room)
        dropped = next(fitting, last)
        kept = render(drop_oldest_turns(messages, dropped))
        return cls(kept, totals[dropped], dropped)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def prompt(self) -> Prompt:
        return Prompt([*itertools.chain.from_iterable(self.ids)], self.dropped_turns)


async def _encode_all(drafts: Sequence[_Draft], encode: Encode) -> None:
    if not drafts:
        return
    segments = [*itertools.chain.from_iterable(draft.segments for draft in drafts)]
    encoded = iter(await encode(segments))
    for draft in drafts:
        draft.ids = [*itertools.islice(encoded, len(draft.segments))]


async def _drop_turns(
    draft: _Draft, messages: Sequence[Message], encode: Encode, target: int
) -> None:
    """Drops just enough further turns to leave at most `target` tokens; always keeps the last."""
    before, turns, last = draft.dropped_turns, draft.ids, len(draft.ids) - 1
    if last == 0:
        return
    # tails[i]: the tokens from turn i on; the last entry is 0.
    tails = [*itertools.accumulate(map(len, reversed(turns)), initial=0)][::-1]
    system = system_bytes(messages)
    first = {} if system else dict(enumerate(turns))

    async def without(more: int) -> Sequence[int]:
        """The ids of the first turn after `more` further turns are dropped."""
        if more not in first:
            shortened = drop_oldest_turns(messages, before + more)
            [first[more]] = await encode(render(shortened)[:1])
        return first[more]

    # Tokens that the system message adds to a turn: estimated, then measured by each probe.
    added = len(turns[0]) * system // max(len(draft.segments[0].text.encode()), 1)
    low, high = 1, last
    for probe in itertools.count():
        if low == high:
            break
        middle = (low + high) // 2
        if probe < _ESTIMATES:
            fitting = (i for i in range(low, high - 1) if added + tails[i] <= target)
            middle = next(fitting, high - 1)
        ids = await without(middle)
        added = len(ids) - len(turns[middle])
        if len(ids) + tails[middle + 1] <= target:
            high = middle
        else:
            low = middle + 1
    draft.ids = [await without(low), *turns[low + 1 :]]
    draft.dropped_turns = before + low


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
