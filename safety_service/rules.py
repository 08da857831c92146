"""A classifier by rules: it finds the words that a rules file names, without understanding them.

It complements the model's own judgement and does not replace a classifier that reads. A rules file
is TOML with a table per category, which holds `terms`, found as whole words, and `patterns`, which
are regular expressions. Both are matched against the normalized text of `normalization.py`:
punctuation and white space hide no term, and only the end of a sentence hides a pattern.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from llama.prompt_format.dialog import Message
from safety_service.normalization import comparable, normalized, spellings
from safety_service.server import Judgement, TimeRemaining
from serving.errors import StartError

_Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _CategoryRules(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    terms: list[_Words] = Field(default_factory=list)
    patterns: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)


_FILE = TypeAdapter(dict[str, _CategoryRules])


@dataclass(frozen=True, slots=True)
class _Category:
    """The expressions of one category."""

    words: re.Pattern[str] | None  # terms of one word
    phrases: re.Pattern[str] | None  # terms of several
    patterns: Sequence[re.Pattern[str]]


@dataclass(frozen=True, slots=True)
class Rules:
    """The expressions of all categories, by name."""

    categories: Mapping[str, _Category]

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
        """The categories of the terms and patterns that a text holds."""
        joined, parted = normalized(text), normalized(text, " ")
        for_words, for_phrases = comparable(joined), comparable(parted)
        for_patterns = spellings(joined)
        if joined != parted:
            for_patterns |= spellings(parted)
        return tuple(
            name
            for name, category in self.categories.items()
            if (category.words and category.words.search(for_words))
            or (category.phrases and category.phrases.search(for_phrases))
            or any(pattern.search(each) for pattern in category.patterns for each in for_patterns)
        )


def _compile(file: str, name: str, rules: _CategoryRules) -> _Category:
    patterns = []
    for index, pattern in enumerate(rules.patterns):
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise StartError(f"{file}: {name}.patterns.{index}: {error}") from error
    if not rules.terms and not patterns:
        raise StartError(f"{file}: {name}: needs terms or patterns")
    single: list[str] = []
    several: list[str] = []
    for index, term in enumerate(rules.terms):
        written = comparable(normalized(term))
        if not written:
            raise StartError(f"{file}: {name}.terms.{index}: has no visible character")
        words = re.findall(r"\w+", written)
        (single if len(words) <= 1 else several).append(_expression(written, words))
    return _Category(_any_of(single), _any_of(several), patterns)


def _any_of(expressions: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(expressions)) if expressions else None


def _expression(written: str, words: Sequence[str]) -> str:
    """A regular expression that finds a term with these words in a `comparable` text.

    Punctuation at an end of the term, as in "c++", must be in the text. Between words, any other
    punctuation will do.
    """
    if words:
        before = re.escape(written[: written.index(words[0])])
        after = re.escape(written[written.rindex(words[-1]) + len(words[-1]) :])
        expressions = [f"{before}{each}{after}" for each in _expressions(words)]
    else:
        expressions = [re.escape(written)]
    # `re` skips quickly to the next possible match only if the expression begins with a character,
    # so the look-behind stands after the first one. \b would never match before a term that begins
    # with a sign.
    first = re.escape(written[0])
    rest = "|".join(each.removeprefix(first) for each in expressions)
    return rf"{first}(?<!\w.)(?:{rest})(?!\w)"


def _expressions(words: Sequence[str]) -> list[str]:
    """Expressions for words in a row, with any punctuation and white space inside them.

    In a single word, white space may separate all characters or none: "c s a m" is the word "csam",
    but "c sam" is two other words. No other text looks like a phrase of several words.
    """
    if len(words) > 1:
        return [r"\W+".join(_characters(word, r"\W*") for word in words)]
    return [_characters(words[0], r"[^\w\s]*"), _characters(words[0], r"\W+")]


def _characters(word: str, between: str) -> str:
    return between.join(map(re.escape, word))
