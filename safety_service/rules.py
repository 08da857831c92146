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
_FORMAT_CHARACTERS = "".join(
    each for each in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(each) == "Cf"
)
_INVISIBLE = re.compile(f"[{_FORMAT_CHARACTERS}]")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is looked for, by category."""

    patterns: Mapping[str, re.Pattern[str]]

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
        return tuple(name for name, pattern in self.patterns.items() if pattern.search(seen))


def normalized(text: str) -> str:
    """The text as rules see it."""
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return unicodedata.normalize("NFKC", folded)  # folding can undo what the first made one


def _compile(file: str, category: str, rules: _Category) -> re.Pattern[str]:
    """All rules of a category as one expression."""
    alternatives = [_whole_words(term) for term in rules.terms]
    for index, pattern in enumerate(rules.patterns):
        try:
            alternatives.append(f"(?:{re.compile(pattern).pattern})")
        except re.error as error:
            raise StartError(f"{file}: {category}.patterns.{index}: {error}") from error
    if not alternatives:
        raise StartError(f"{file}: {category}: needs terms or patterns")
    return re.compile("|".join(alternatives))


def _whole_words(term: str) -> str:
    # Not \b, which would never match in front of a term that begins with a sign.
    words = r"\s+".join(map(re.escape, normalized(term).split()))
    return rf"(?<!\w){words}(?!\w)"
