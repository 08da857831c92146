"""The encoder of the library `tokenizers`, whose failures are ordinary errors.

The library is written in Rust. An error that it does not expect is a panic, which PyO3 raises as a
BaseException: handlers of errors do not catch it, and a call would get no status. An expression of
a pre-tokenizer that takes too many steps on a text panics, too.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

# A text with all bytes that begin or continue a character of UTF-8.
_PROBE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, 0xFFFF)))
_PROBE += "".join(map(chr, (0x10000, 0x40000, 0x80000, 0xC0000, 0x10FFFF)))


class LibraryError(ValueError):
    """The library failed; the message is its own."""


class LibraryEncoder:
    """Encodes texts by a tokenizer.json's description. Safe to use from several threads."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        """LibraryError if the library cannot read it, or fails on a text of all characters."""
        with _library_errors():
            self._tokenizer = Tokenizer.from_str(json.dumps(description))
        # A wrong part may show only in use, such as an unknown token that is not in the vocabulary.
        self.encode(_PROBE)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; LibraryError if the library fails on it."""
        # Unlike `encode`, this releases the interpreter lock.
        with _library_errors():
            [encoded] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoded.ids)


@contextmanager
def _library_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `tokenizers` raises no narrower one
        raise LibraryError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # PyO3 gives no way to import it
            raise
        raise LibraryError(str(error)) from None
