"""Meta's dialog rules, which hold for every prompt format, and Llama 2's prompt format.

The model was trained on every space here: the text must equal that of `chat_completion` in Meta's
llama/generation.py to the byte.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from llama.prompt_format.tags import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS, special_tags
from serving.errors import Violation

UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

# The roles that may follow a role; `None` stands for the beginning of the dialog.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER,),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Any `role` but `system`, `user` and `assistant` breaks the rules."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A text that is encoded on its own, with control tokens before and after it.

    `bos` and `eos` put in the tokenizer's own beginning and end of a sequence. `control_token` is
    the name of a token in front of the text, which is then encoded as one in the middle of a
    prompt; an empty text has no ids. As in `llama.v1.Segment`.
    """

    text: str
    bos: bool = False
    eos: bool = False
    control_token: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message with its answer, and its place in the dialog."""

    user: str
    answer: str | None = None  # None: the open turn, which is the dialog's last
    system: str | None = None  # the dialog's system message, the same in each of its turns
    first: bool = False


def violations(dialog: Sequence[Message], path: str) -> list[Violation]:
    """Every rule of order that the dialog breaks; `path` is the dialog's own field path.

    Each role is compared with the message before it, so that one misplaced message is one violation
    and not one for each message after it.
    """
    if not dialog:
        return [Violation(f"{path}.messages", "must not be empty")]
    found = []
    before: str | None = None
    for index, message in enumerate(dialog):
        if problem := _misplaced(message.role, before, last=index == len(dialog) - 1):
            found.append(Violation(f"{path}.messages[{index}].role", problem))
        before = message.role
    return found


def _misplaced(role: str, before: str | None, *, last: bool) -> str | None:
    if role not in _NEXT:
        return "must be system, user or assistant"
    if role == SYSTEM and before is not None:
        return "only the first message may be from the system"
    # After an unknown role, only a second system message would certainly be wrong.
    allowed = _NEXT.get(before, (USER, ASSISTANT))
    if role not in allowed:
        place = "the first message" if before is None else f"the message after one by the {before}"
        authors = " or ".join(f"the {author}" for author in allowed)
        return f"{place} must be from {authors}, not from the {role}"
    if last and role != USER:
        return f"the last message must be from the user, not from the {role}"
    return None


def has_special_tags(dialog: Sequence[Message], tags: Sequence[str] = SPECIAL_TAGS) -> bool:
    """Whether any content, the system message's too, could pass for part of the prompt format."""
    return any(special_tags(message.content, tags) for message in dialog)


def turns(dialog: Sequence[Message]) -> Iterator[Turn]:
    """The turns of a valid dialog: the finished ones, then the open one."""
    system = dialog[0].content if dialog[0].role == SYSTEM else None
    contents = [message.content for message in dialog[system is not None :]]
    for index in range(0, len(contents), 2):
        answer = contents[index + 1] if index + 1 < len(contents) else None
        yield Turn(contents[index], answer, system, first=index == 0)


def render(dialog: Sequence[Message]) -> list[Segment]:
    """The segments of a valid dialog in Llama 2's format: one for each turn."""
    return [*chain.from_iterable(map(render_turn, turns(dialog)))]


def render_turn(turn: Turn) -> tuple[Segment, ...]:
    """The segment of a turn in Llama 2's format."""
    user = turn.user
    if turn.first and turn.system is not None:
        user = with_system(turn.system, user)
    if turn.answer is None:
        return (Segment(open_turn(user), bos=True),)
    return (Segment(finished_turn(user, turn.answer), bos=True, eos=True),)


def with_system(system: str, user: str) -> str:
    """The first user message with the system message in front of it.

    As in Meta's code, it is stripped afterwards, so the user's leading white space stays.
    """
    return f"{B_SYS}{system}{E_SYS}{user}"


def open_turn(user: str) -> str:
    """The text of a turn that waits for its answer."""
    return f"{B_INST} {user.strip()} {E_INST}"


def finished_turn(user: str, answer: str) -> str:
    """The text of a turn with its answer, up to EOS."""
    return f"{open_turn(user)} {answer.strip()} "


def drop_oldest_turns(dialog: Sequence[Message], count: int) -> list[Message]:
    """The dialog without its `count` oldest pairs; the system message stays."""
    system = dialog[:1] if dialog[0].role == SYSTEM else []
    return [*system, *dialog[len(system) + 2 * count :]]
