"""Encodes dialogs and texts to prompts, token ids within the context length.

Text that cannot fit is not encoded: its bytes divided by those of the longest token are a lower
bound of its tokens. If that is too much already, the request is refused, or the dialog loses turns,
before the tokenizer service is called. The rest of a request is encoded in one call of `encode`.
Only a dialog that must lose turns may need more calls, where its format writes the turn that comes
first in another way than those behind it, as Llama 2's does with a system message.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from gateway.request.draft import Draft, Prompt
from gateway.request.turn_dropper import Encode, TurnDropper
from gateway.request.window import Window
from llama.prompt_format.dialog import Message
from llama.prompt_format.formats import LLAMA2, PromptFormat
from serving import request_rules
from serving.errors import Violation, invalid_argument
from serving.intake.time_slice import TimeSlice


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
        drafts.append(Draft.of_dialog(messages, prompt_format, window, answer_room))
        await time_slice.yield_if_over()
    _require_room(dialogs, drafts, window)
    await _encode_all(drafts, encode)
    for draft, messages in zip(drafts, dialogs.values(), strict=True):
        if answer_room is not None and draft.tokens > window.length - answer_room:
            await TurnDropper(draft, messages, prompt_format, encode).drop(
                window.length - answer_room
            )
    _require_room(dialogs, drafts, window)
    return [draft.prompt() for draft in drafts]


async def encode_texts(texts: Mapping[str, str], encode: Encode, window: Window) -> list[Prompt]:
    """The prompts of texts, given by their field paths; INVALID_ARGUMENT as for dialogs."""
    drafts = [Draft.of_text(text, window) for text in texts.values()]
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


async def _encode_all(drafts: Sequence[Draft], encode: Encode) -> None:
    if not drafts:
        return
    segments = [*itertools.chain.from_iterable(draft.segments for draft in drafts)]
    encoded = iter(await encode(segments))
    for draft in drafts:
        draft.ids = [[*itertools.islice(encoded, len(turn))] for turn in draft.turns]


def _require_room(paths: Iterable[str], drafts: Sequence[Draft], window: Window) -> None:
    violations = []
    for path, draft in zip(paths, drafts, strict=True):
        if draft.ids and draft.tokens > window.length:
            violations.append(too_long(path, draft.tokens, window, draft.dropped_turns))
        elif draft.least_tokens > window.length:
            least = f"at least {draft.least_tokens}"
            violations.append(too_long(path, least, window, draft.dropped_turns))
    if violations:
        raise invalid_argument(violations)
