"""Meta's dialog rules and prompt format as pure functions: which dialogs are allowed, what text
each becomes, which are refused. The model was trained on every space here: the text must equal that
of `chat_completion` in Meta's llama/generation.py to the byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama.prompt_format.tags import B_INST, B_SYS, E_INST, E_SYS, special_tags
from serving.errors import Violation

UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

# Who may write the message after one of this author; `None` is the beginning of the dialog.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER,),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `role` is `system`, `user` or `assistant`, anything else breaks the rules."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A text that is encoded on its own, between control tokens that are no part of the text."""

    text: str
    bos: bool
    eos: bool


def violations(dialog: Sequence[Message], path: str) -> list[Violation]:
    """Every rule of order that the dialog breaks; `path` is the dialog's own field path.

    A role is judged by the message before it, so that one misplaced message is one violation and
    not one for each message after it.
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
    # After a role that is none, nothing more is known to be wrong.
    allowed = _NEXT.get(before, (USER, ASSISTANT))
    if role not in allowed:
        place = "the first message" if before is None else f"the message after one by the {before}"
        authors = " or ".join(f"the {author}" for author in allowed)
        return f"{place} must be from {authors}, not from the {role}"
    if last and role != USER:
        return f"the last message must be from the user, not from the {role}"
    return None


def has_special_tags(dialog: Sequence[Message]) -> bool:
    """Whether any content, the system message's too, could pass for part of the prompt format."""
    return any(special_tags(message.content) for message in dialog)


def render(dialog: Sequence[Message]) -> list[Segment]:
    """The segments of a dialog without violations: its finished turns, then the open one."""
    if dialog[0].role == SYSTEM:
        system, first, *rest = dialog
        # Stripped only when put together, as Meta does: the user's leading white space stays.
        dialog = [Message(USER, f"{B_SYS}{system.content}{E_SYS}{first.content}"), *rest]
    contents = [message.content.strip() for message in dialog]
    finished = zip(contents[:-1:2], contents[1::2], strict=True)
    return [
        *(Segment(f"{B_INST} {user} {E_INST} {answer} ", True, True) for user, answer in finished),
        Segment(f"{B_INST} {contents[-1]} {E_INST}", True, False),
    ]


def system_bytes(dialog: Sequence[Message]) -> int:
    """The least that a system message adds to the first turn, in bytes; 0 without one."""
    if dialog[0].role != SYSTEM:
        return 0
    return len(f"{B_SYS}{dialog[0].content}{E_SYS.rstrip()}".encode())


def drop_oldest_turns(dialog: Sequence[Message], count: int) -> list[Message]:
    """The dialog without its `count` oldest pairs; the system message stays."""
    system = dialog[:1] if dialog[0].role == SYSTEM else []
    return [*system, *dialog[len(system) + 2 * count :]]
