"""Reads and checks the dialogs of a request one after the other: a request may hold tens of
thousands of messages, which would block the event loop, and so all streams, if read at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.request.options import RequestLimits
from gateway.request.validation import parse_dialog
from llama.prompt_format import dialog
from llama.prompt_format.formats import LLAMA2, PromptFormat
from llama.v1 import chat_pb2
from serving.errors import MAX_VIOLATIONS, Violation
from serving.intake.time_slice import TimeSlice
from serving.request_rules import count_violations


@dataclass(frozen=True, slots=True)
class Dialogs:
    """A request's dialogs by field path, and which of them hold special tags."""

    messages: dict[str, list[dialog.Message]] = field(default_factory=dict)
    unsafe: set[str] = field(default_factory=set)
    violations: list[Violation] = field(default_factory=list)

    @property
    def safe(self) -> dict[str, list[dialog.Message]]:
        return {path: each for path, each in self.messages.items() if path not in self.unsafe}


async def read_dialogs(
    dialogs: Sequence[chat_pb2.Dialog],
    limits: RequestLimits,
    prompt_format: PromptFormat = LLAMA2,
) -> Dialogs:
    """Reads all dialogs; stops early once there are more violations than an error reports."""
    read = Dialogs(violations=count_violations("dialogs", len(dialogs), limits.max_dialogs))
    if read.violations:
        return read
    time_slice = TimeSlice()
    for index, each in enumerate(dialogs):
        read_dialog(f"dialogs[{index}]", each, limits, prompt_format, read)
        if len(read.violations) > MAX_VIOLATIONS:
            break
        await time_slice.yield_if_over()
    return read


def read_dialog(
    path: str,
    message: chat_pb2.Dialog,
    limits: RequestLimits,
    prompt_format: PromptFormat,
    into: Dialogs,
) -> None:
    """Adds the dialog, or its violations, to `into`."""
    violations = count_violations(f"{path}.messages", len(message.messages), limits.max_messages)
    if not violations:
        messages = parse_dialog(message)
        violations = dialog.violations(messages, path)
    if violations:
        into.violations.extend(violations)
        return
    into.messages[path] = messages
    if prompt_format.has_special_tags(messages):
        into.unsafe.add(path)
