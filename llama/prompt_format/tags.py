"""The special tags of Llama 2's prompt format, under the names that Meta's code gives them.

Meta's rule refuses a dialog with such a tag in any of its messages, because the tag could pass for
part of the prompt format. But Llama 2 Chat writes tags unasked, and if such an answer were sent
back as part of its dialog, every later turn would be refused.
"""

from collections.abc import Sequence

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS: tuple[str, ...] = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())


def special_tags(text: str, tags: Sequence[str] = SPECIAL_TAGS) -> tuple[str, ...]:
    """The tags that a text holds; `tags` are those of the prompt format, by default Llama 2's."""
    return tuple(tag for tag in tags if tag in text)


def without_special_tags(text: str, tags: Sequence[str] = SPECIAL_TAGS) -> str:
    """The text as a message for which no dialog is refused."""
    while found := special_tags(text, tags):  # again, because what is left may have become a tag
        for tag in found:
            text = text.replace(tag, "")
    return text
