"""A classifier of words: it finds what a rules file names, and understands nothing. A floor under a
model's own judgement, not a replacement for a classifier that reads.

A rules file is TOML, a table per category with `terms`, which are found as whole words, and
`patterns`, regular expressions. Both are matched against text in which spellings that look alike
are one: Unicode's NFKC, case folded, invisible characters left out.
"""

import re
import sys
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from safety_service.servicer import Judgement, Message, TimeRemaining
from serving.errors import StartError

_Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Category(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    terms: list[_Words] = Field(default_factory=list)
    patterns: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)


_FILE = TypeAdapter(dict[str, _Category])

# Soft hyphens, joiners, marks of direction: what splits a word for a program and not for a reader.
_INVISIBLE = dict.fromkeys(
    code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Cf"
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is looked for, by category."""

    patterns: Mapping[str, Sequence[re.Pattern[str]]]

    @classmethod
    def read(cls, path: Path | None = None) -> "Rules":
        """From a file, by default the one that comes with the service; StartError."""
        name = str(path or "the rules that come with the service")
        source = path or resources.files("safety_service") / "rules.toml"
        try:
            categories = _FILE.validate_python(tomllib.loads(source.read_text("utf-8")))
        except OSError as error:
            raise StartError(f"cannot read {name}: {error.strerror}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StartError(f"{name} is not TOML: {error}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise StartError(f"{name}: {place}: {problem['msg']}") from error
        if not categories:
            raise StartError(f"{name} has no category: it would find nothing")
        return cls({each: _compile(name, each, rules) for each, rules in categories.items()})

    async def judge(self, messages: Sequence[Message], _time_remaining: TimeRemaining) -> Judgement:
        """Judges the last message alone."""
        found = self.find(messages[-1].content)
        return Judgement(bool(found), found)

    def find(self, text: str) -> tuple[str, ...]:
        """The categories of which a text holds something."""
        seen = normalized(text)
        return tuple(
            name
            for name, patterns in self.patterns.items()
            if any(pattern.search(seen) for pattern in patterns)
        )


def normalized(text: str) -> str:
    """The text as rules see it."""
    if text.isascii():
        return text.casefold()
    folded = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold()
    return unicodedata.normalize("NFKC", folded)  # folding can undo what the first made one


def _compile(file: str, category: str, rules: _Category) -> list[re.Pattern[str]]:
    """All terms of a category as one expression, then its patterns."""
    compiled = [re.compile("|".join(map(_whole_words, rules.terms)))] if rules.terms else []
    for index, pattern in enumerate(rules.patterns):
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise StartError(f"{file}: {category}.patterns.{index}: {error}") from error
    if not compiled:
        raise StartError(f"{file}: {category}: needs terms or patterns")
    return compiled


def _whole_words(term: str) -> str:
    words = r"\s+".join(map(re.escape, normalized(term).split()))
    # What comes before is looked at behind the first character, as `re` quickly skips whatever
    # cannot begin a match only where the expression begins with a character. Not by \b, which
    # would never match in front of a term that begins with a sign.
    first = re.match(r"\\?.", words)
    start = first.end() if first else 0
    return rf"{words[:start]}(?<!\w.){words[start:]}(?!\w)"
