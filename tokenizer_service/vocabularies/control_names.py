"""The names that are control tokens, whatever a file says about them."""

import re

_CONTROL_NAME = re.compile(r"<\|[^|\s]+\|>")


def is_control_name(name: str) -> bool:
    """Whether a token has a name like `<|im_end|>`.

    Files of fine-tuned models often list such tokens as ordinary ones, which any text could contain
    and every answer would show. llama.cpp overrides them likewise.
    """
    return _CONTROL_NAME.fullmatch(name) is not None
