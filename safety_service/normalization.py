"""The text that rules see: spellings that look alike are equal, and invisible characters are gone.

Punctuation stays. The expressions for terms allow it, and patterns are matched with `spellings`.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable

# Default_Ignorable_Code_Point in Unicode's DerivedCoreProperties.txt, first and last of each range;
# equal in all versions from 14.0 to 18.0. Python's unicodedata does not have this property.
_DEFAULT_IGNORABLE = (
    *((0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5)),
    *((0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164)),
    *((0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8)),
    *((0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)
# Hangul fillers are ignorable but shown as a blank. They count as punctuation.
_FILLERS = {0x115F, 0x1160, 0x3164, 0xFFA0}


def _character_class(codes: Iterable[int]) -> str:
    """The inside of a regular expression's character class for these code points."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


_CATEGORIES = [
    (code, category)
    for code, category in enumerate(map(unicodedata.category, map(chr, range(sys.maxunicode + 1))))
    if category.startswith(("M", "P", "S", "Cc", "Cf"))
]


def _of_category(*wanted: str) -> set[int]:
    """The code points whose category begins with one of these."""
    return {code for code, category in _CATEGORIES if category.startswith(wanted)}


_IGNORABLE = {code for first, last in _DEFAULT_IGNORABLE for code in range(first, last + 1)}
# Format and control characters that are not white space.
_CONTROL = {code for code in _of_category("Cf", "Cc") if not chr(code).isspace()}
_INVISIBLE = re.compile(f"[{_character_class((_IGNORABLE | _CONTROL) - _FILLERS)}]+")

# Signs such as the macron, which NFKC turns into a space and a combining mark.
_SPACED_MARKS = {
    code for code in _of_category("P", "S") if " " in unicodedata.normalize("NFKC", chr(code))
}
_SHOWN_AS_BLANK = re.compile(f"[{_character_class(_FILLERS | _SPACED_MARKS)}]+")

# Combining marks belong to the word around them, but `\w` does not match them.
_COMBINING = _of_category("M") - _IGNORABLE
_IN_WORDS = r"\w" + _character_class(_COMBINING)
_PUNCTUATION = re.compile(rf"[^\s{_IN_WORDS}][^{_IN_WORDS}]*")
_SENTENCE_END = re.compile(r"[.?!]")
# For comparing words, rare ideographs, which `\w` matches, stand for them.
_COMBINING_AS_LETTERS = {code: 0x20000 + index for index, code in enumerate(sorted(_COMBINING))}


def normalized(text: str, invisible: str = "") -> str:
    """The text in NFKC and folded case, with single spaces, and `invisible` for invisible runs."""
    text = _INVISIBLE.sub(invisible, text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _SHOWN_AS_BLANK.sub("-", text)).casefold()
        text = unicodedata.normalize("NFKC", text)  # because folding can undo the first
    return " ".join(text.casefold().split())


def comparable(text: str) -> str:
    r"""A normalized text in which `\w` matches combining marks but not the underscore."""
    text = text.replace("_", "-")
    return text if text.isascii() else text.translate(_COMBINING_AS_LETTERS)


def spellings(text: str) -> set[str]:
    """Three spellings of a normalized text, all with the ends of sentences.

    The text as it is; with punctuation replaced by spaces; and with punctuation inside of words
    removed and other replaced by spaces.
    """
    spaced, joined = [], []
    position = 0
    plain = text.replace("_", "-")
    for gap in _PUNCTUATION.finditer(plain):
        words, run = plain[position : gap.start()], gap[0]
        position = gap.end()
        end = _SENTENCE_END.search(run)
        if end and (position == len(plain) or " " in run[end.end() :]):
            between = f"{end[0]} "
        elif words.endswith(" ") or " " in run:
            between = " "
        else:
            between = ""
        spaced += [words.rstrip(" "), between or " "]
        joined += [words.rstrip(" "), between]
    rest = plain[position:]
    return {text, "".join([*spaced, rest]), "".join([*joined, rest])}
