"""Dialogs and texts to the token ids that the model is given: one `Encode` call for all of a
request. Only a dialog with a system message that must lose turns costs further ones, as the system
message is encoded together with whichever turn is then the first.
"""

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from gateway import dialog
from gateway.dialog import Message, Segment
from serving.errors import Violation, invalid_argument
from serving.request_rules import too_long

Encode = Callable[[Sequence[Segment]], Awaitable[list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given."""

    ids: list[int]
    dropped_turns: int = 0


async def encode_dialogs(
    dialogs: Mapping[str, Sequence[Message]],
    encode: Encode,
    context_length: int,
    *,
    drop_oldest_turns: bool,
) -> list[Prompt]:
    """The prompts of dialogs, given by their field paths.

    INVALID_ARGUMENT names each dialog that does not fit the context length, if need be without its
    oldest turns.
    """
    rendered = [dialog.render(each) for each in dialogs.values()]
    encoded = iter(await encode([*itertools.chain.from_iterable(rendered)]) if rendered else ())
    prompts = []
    for messages, segments in zip(dialogs.values(), rendered, strict=True):
        turns = list(itertools.islice(encoded, len(segments)))
        prompt = Prompt([*itertools.chain.from_iterable(turns)])
        if drop_oldest_turns and len(prompt.ids) > context_length and len(turns) > 1:
            prompt = await _drop_oldest_turns(messages, turns, encode, context_length)
        prompts.append(prompt)
    _require_room(dict(zip(dialogs, prompts, strict=True)), context_length)
    return prompts


async def encode_texts(
    texts: Mapping[str, str], encode: Encode, context_length: int
) -> list[Prompt]:
    """The prompts of texts, given by their field paths; INVALID_ARGUMENT as for dialogs."""
    encoded = await encode([Segment(text, bos=True, eos=False) for text in texts.values()])
    return take_ids(dict(zip(texts, encoded, strict=True)), context_length)


def take_ids(prompts: Mapping[str, list[int]], context_length: int) -> list[Prompt]:
    """Ids as they are, given by their field paths; INVALID_ARGUMENT as for dialogs."""
    taken = {path: Prompt(ids) for path, ids in prompts.items()}
    _require_room(taken, context_length)
    return list(taken.values())


async def _drop_oldest_turns(
    messages: Sequence[Message], turns: list[list[int]], encode: Encode, context_length: int
) -> Prompt:
    """The prompt without as few turns as make it fit; just the last turn if even that does not."""

    async def without(dropped: int) -> list[int]:
        first = turns[dropped]
        if messages[0].role == dialog.SYSTEM:
            shortened = dialog.drop_oldest_turns(messages, dropped)
            [first] = await encode(dialog.render(shortened)[:1])
        return [*first, *itertools.chain.from_iterable(turns[dropped + 1 :])]

    # The more turns go, the shorter the prompt: a single border parts too long from fitting ones.
    low, high = 1, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        if len(await without(middle)) <= context_length:
            high = middle
        else:
            low = middle + 1
    return Prompt(await without(low), low)


def _require_room(prompts: Mapping[str, Prompt], context_length: int) -> None:
    violations = [
        Violation(
            path,
            too_long(len(prompt.ids), context_length)
            + (f" ({prompt.dropped_turns} oldest turns dropped)" if prompt.dropped_turns else ""),
        )
        for path, prompt in prompts.items()
        if len(prompt.ids) > context_length
    ]
    if violations:
        raise invalid_argument(violations)
