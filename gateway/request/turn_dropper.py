"""Drops the oldest turns of a dialog that does not fit the context."""

import itertools
from collections.abc import Awaitable, Callable, Sequence

from gateway.request.draft import Draft, first_turn_adds, token_count
from gateway.request.window import Window
from llama.prompt_format.dialog import Message, Segment
from llama.prompt_format.formats import PromptFormat

Encode = Callable[[Sequence[Segment]], Awaitable[Sequence[Sequence[int]]]]

# Probes by estimate in the search for the first turn to keep, before it continues by bisection.
_ESTIMATES = 3


class TurnDropper:
    """Drops the oldest turns of an encoded dialog."""

    def __init__(
        self,
        draft: Draft,
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
        counts = [*map(token_count, draft.ids)]
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
            tokens = token_count(await self._first_turn(middle))
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
        added = first_turn_adds(self._format, self._messages, window)
        return tokens * added.bytes // max(window.size(self._draft.turns[0]).bytes, 1)

    async def _first_turn(self, dropped: int) -> list[Sequence[int]]:
        """The ids of the first turn after so many further turns are dropped."""
        turn = self._format.first_turn(self._messages, self._draft.dropped_turns + dropped)
        unknown = [each for each in turn if each not in self._known]
        if unknown:
            self._known.update(zip(unknown, await self._encode(unknown), strict=True))
        return [self._known[each] for each in turn]
