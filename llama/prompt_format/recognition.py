"""The prompt format of a model, from the chat template in its files.

A template is recognised by its text and never run, because a downloaded file should not run code in
a server. An unknown template is refused: a prompt in the wrong format would give bad answers
without an error.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from llama.prompt_format.formats import FORMATS, LLAMA2, PromptFormat, marked
from llama.prompt_format.published import TEMPLATE_PARTS, WHOLE_TEMPLATES, WholeTemplate
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
    text = canonical(template)
    for whole in WHOLE_TEMPLATES:
        if found := re.fullmatch(whole.pattern, text):
            return _with_default_system(whole, found.groupdict().get("default_system"))
    for parts in TEMPLATE_PARTS:
        if all(each in text for each in parts.required) and not any(
            each in text for each in parts.forbidden
        ):
            return parts.format
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


def _with_default_system(whole: WholeTemplate, default_system: str | None) -> PromptFormat:
    if default_system is None or whole.marks is None:
        return whole.format
    marks = replace(whole.marks, default_system=unescaped(default_system))
    return marked(whole.format.name, marks, special_tags=whole.format.special_tags)
