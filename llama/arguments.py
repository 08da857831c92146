"""The check of the arguments of `Llama`'s methods, before anything runs.

`Llama.build` and `Llama.connect` both use it, so they refuse the same arguments with the same
words. The rules are those of the services.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex, TypeVar, cast

from llama.prompt_format.dialog import Message
from llama.prompt_format.dialog import violations as order_violations
from serving.errors import Violation, invalid_argument
from serving.request_rules import IntegerRule, as_float32, as_integer, number_violations

T = TypeVar("T")

_TOKEN_ID = IntegerRule(0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling arguments of a call."""

    temperature: float
    top_p: float
    max_gen_len: int | None  # None for as many as the context leaves


def refuse(violations: Iterable[Violation]) -> None:
    """Raises ValueError that names each field and the rule that it breaks, if there are any."""
    if broken := [*violations]:
        raise ValueError(invalid_argument(broken).message)


def checked(
    read: "Callable[[Arguments, object], list[T]]",
    prompts: object,
    temperature: object,
    top_p: object,
    max_gen_len: object,
) -> tuple[list[T], Sampling]:
    """The arguments of one call, with the prompts as `read` returns them.

    Raises:
        ValueError: an argument breaks a rule; the message names each with its path.
    """
    arguments = Arguments()
    found = read(arguments, prompts)
    sampling = arguments.sampling(temperature, top_p, max_gen_len)
    refuse(arguments.violations)
    return found, sampling


class Arguments:
    """Reads the arguments of one call and collects the violations of rules."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def dialogs(self, dialogs: object) -> list[list[Message]]:
        found = self._list(dialogs, "dialogs", "dialogs")
        return [self._dialog(each, f"dialogs[{i}]") for i, each in enumerate(found)]

    def texts(self, prompts: object) -> list[str]:
        found = self._list(prompts, "prompts", "texts")
        return [self._text(each, f"prompts[{i}]") for i, each in enumerate(found)]

    def token_ids(self, prompts: object) -> list[list[int]]:
        found = self._list(prompts, "prompt_tokens", "lists of token ids")
        return [self._ids(each, f"prompt_tokens[{i}]") for i, each in enumerate(found)]

    def sampling(self, temperature: object, top_p: object, max_gen_len: object) -> Sampling:
        """A negative temperature is greedy, as in Meta's code."""
        number = as_float32(temperature)
        if number is not None and number < 0:
            temperature = 0.0
        values: dict[str, object] = {"temperature": temperature, "top_p": top_p}
        if max_gen_len is not None:
            values["max_gen_len"] = max_gen_len
        self.violations += number_violations(values)
        return Sampling(
            as_float32(temperature) or 0.0,
            as_float32(top_p) or 0.0,
            None if max_gen_len is None else as_integer(max_gen_len),
        )

    def _add(self, path: str, problem: str) -> None:
        self.violations.append(Violation(path, problem))

    def _list(self, value: object, path: str, items: str) -> list[object]:
        """A text or a dictionary is iterable, too, but here it is a mistake."""
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            return list(value)
        self._add(path, f"must be a list of {items}, not {_kind(value)}")
        return []

    def _dialog(self, value: object, path: str) -> list[Message]:
        before = len(self.violations)
        messages = [
            self._message(each, f"{path}.messages[{index}]")
            for index, each in enumerate(self._list(value, path, "messages"))
        ]
        if len(self.violations) == before:
            self.violations += order_violations(messages, path)
        return messages

    def _message(self, value: object, path: str) -> Message:
        if not isinstance(value, Mapping):
            self._add(path, f"must be a message with role and content, not {_kind(value)}")
            return Message("", "")
        for key in ("role", "content"):
            if key not in value:
                self._add(f"{path}.{key}", "is missing")
        role = value.get("role", "")
        return Message(
            role if isinstance(role, str) else "",
            self._text(value.get("content", ""), f"{path}.content"),
        )

    def _text(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            self._add(path, f"must be a text, not {_kind(value)}")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(value[error.start]):04X} at character {error.start}"
            self._add(path, f"holds a lone surrogate ({surrogate}), which is not valid unicode")
        return value

    def _ids(self, value: object, path: str) -> list[int]:
        before = len(self.violations)
        found = self._list(value, path, "token ids")
        if not found and len(self.violations) == before:
            self._add(path, "must not be empty")
        for index, each in enumerate(found):
            if problem := _TOKEN_ID.problem(each):
                self._add(f"{path}[{index}]", problem)
                return []  # one violation is enough
        return [operator.index(cast("SupportsIndex", each)) for each in found]


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
