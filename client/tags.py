"""The special tags of Llama 2's prompt format.

A dialog that holds one in any of its messages is refused, by Meta's rule: it could pass for part of
the prompt format. Llama 2 Chat writes such tags unasked, though, and an answer with one, sent back
as a part of its dialog, would have every later turn refused.
"""

SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def special_tags(text: str) -> tuple[str, ...]:
    """The tags that a text holds."""
    return tuple(tag for tag in SPECIAL_TAGS if tag in text)


def without_special_tags(text: str) -> str:
    """The text as a message that no dialog is refused for."""
    while found := special_tags(text):  # again, as what is left may have become a tag
        for tag in found:
            text = text.replace(tag, "")
    return text
