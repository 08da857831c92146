"""The stages that a tokenizer.json describes: normalizers, pre-tokenizers and decoders."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

_LISTS = ("normalizers", "pretokenizers", "decoders", "processors")
# Pre-tokenizers that only divide a text.
_DIVIDING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


def stages(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The stages of a part of the description, one by one; those of a Sequence in its place."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for name in _LISTS:
        for each in part.get(name, ()):
            yield from stages(each)


def find(part: Mapping[str, Any] | None, kind: str) -> Mapping[str, Any] | None:
    """The first stage of this type."""
    return next((each for each in stages(part) if each.get("type") == kind), None)


def keeps_text(description: Mapping[str, Any]) -> bool:
    """Whether encoding leaves no character of a text out and replaces none by a shorter one."""
    return all(map(_only_adds, stages(description.get("normalizer")))) and all(
        each.get("type") in _DIVIDING and each.get("behavior") != "Removed"
        for each in stages(description.get("pre_tokenizer"))
    )


def _only_adds(normalizer: Mapping[str, Any]) -> bool:
    match normalizer:
        case {"type": "Prepend"} | {"type": "ByteLevel"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(before)}, "content": str(after)}:
            return len(after.encode()) >= len(before.encode())
    return False


def prepends_always(metaspace: Mapping[str, Any]) -> bool:
    """Whether a Metaspace puts a space in front of every text."""
    return _prepend_scheme(metaspace) == "always"


def prepends(metaspace: Mapping[str, Any]) -> bool:
    """Whether a Metaspace puts a space in front of a prompt."""
    return _prepend_scheme(metaspace) != "never"


def _prepend_scheme(metaspace: Mapping[str, Any]) -> str:
    # Versions of `tokenizers` before 0.14 knew add_prefix_space alone.
    default = "always" if metaspace.get("add_prefix_space", True) else "never"
    return str(metaspace.get("prepend_scheme", default))


def for_middle_of_prompt(pre_tokenizer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The pre-tokenizer for a text that does not begin a prompt."""
    changed = deepcopy(pre_tokenizer)
    for each in stages(changed):
        if each.get("type") == "Metaspace" and not prepends_always(each):
            each["prepend_scheme"] = "never"  # type: ignore[index]
    return changed
