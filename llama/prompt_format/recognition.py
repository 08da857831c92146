"""The prompt format of a model, from the chat template in its files.

A template is recognised by its text and never run, because a downloaded file should not run code in
a server. An unknown template is refused: a prompt in the wrong format would give bad answers
without an error.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from llama.prompt_format.formats import FORMATS, LLAMA2, LLAMA_GUARD, PromptFormat, marked
from llama.prompt_format.published import (
    LLAMA_GUARD_PARTS,
    PUBLISHED_TEMPLATES,
    PublishedTemplate,
)
from llama.prompt_format.template_text import canonical, unescaped

# For settings: `auto` is the format of the model's chat template.
FormatName = Literal[
    "auto",
    "llama2",
    "llama3",
    "llama3.1",
    "chatml",
    "zephyr",
    "vicuna",
    "mistral",
    "mistral-v3",
    "llama-guard",
]


class PromptFormatError(ValueError):
    """No format can be used; the message says why and what to do."""


def choose_format(name: FormatName, template: str) -> PromptFormat:
    """The format `name`, or with `auto` that of the template; PromptFormatError."""
    return recognised(template) if name == "auto" else FORMATS[name]


def recognised(template: str) -> PromptFormat:
    """The format of a template, Llama 2's for an empty one; PromptFormatError if it is unknown."""
    if not template.strip():
        return LLAMA2
    try:
        text = canonical(template)
    except (RecursionError, MemoryError):  # nested deeper than any that is published
        text = ""
    for published in PUBLISHED_TEMPLATES:
        if found := re.fullmatch(published.pattern, text):
            return _with_default_system(published, found.groupdict().get("default_system"))
    if all(each in text for each in LLAMA_GUARD_PARTS):
        return LLAMA_GUARD
    raise PromptFormatError(
        "the chat template in the model's files is unknown: name the format of its prompts with "
        f"--prompt_format, one of {', '.join(FORMATS)}"
    )


def require_control_tokens(chosen: PromptFormat, vocabulary: Collection[str]) -> None:
    """PromptFormatError if the vocabulary lacks control tokens of the format."""
    if missing := [each for each in chosen.control_tokens if each not in vocabulary]:
        raise PromptFormatError(
            f"the prompt format {chosen.name} needs control tokens that the vocabulary lacks, "
            f"{', '.join(missing)}: name another format with --prompt_format, one of "
            f"{', '.join(FORMATS)}"
        )


def _with_default_system(published: PublishedTemplate, default_system: str | None) -> PromptFormat:
    if default_system is None or published.marks is None:
        return published.format
    marks = replace(published.marks, default_system=unescaped(default_system))
    return marked(published.format.name, marks, special_tags=published.format.special_tags)
