"""The training text as data: topics, styles, unknown questions and passages, read from text/.

A wording may hold alternatives, `{Hi|Hello} there{, friend|}`, so that a few lines stand for many
ways to ask; README.md describes the files. Nothing here is random: dialogs.py decides how often it
draws which of these records.
"""

import re
import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "text"
HELD_OUT = TEXT / "held_out.toml"
TOPIC_FILES = ("small_talk", "self", "chasqui", "llamas", "andes", "cooking", "first_words")

_CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Topic:
    """Questions with the same answer, and the questions that may follow it."""

    name: str
    group: str
    ask: tuple[str, ...]
    answer: tuple[str, ...]
    short: str | None = None
    told: tuple[str, ...] = ()
    then: tuple["Topic", ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Style:
    """A way to answer, the system messages that ask for it, and its effect on an answer."""

    name: str
    system: tuple[str, ...]
    inline: tuple[str, ...]
    again: tuple[str, ...]
    weight: float
    wrap: str | None
    first_sentence: bool
    answers: dict[str, tuple[str, ...]]

    def apply(self, topic: Topic, answer: str) -> tuple[str, ...]:
        """The styled forms of `answer`, which belongs to `topic`; any of them will do."""
        if self.wrap is not None:
            return (self.wrap.replace("{answer}", answer),)
        if self.first_sentence:
            return (topic.short or re.split(r"(?<=[.!?])\s", answer)[0],)
        family = topic.name.split(":")[0]
        return self.answers.get(family) or self.answers[topic.group]


@dataclass(frozen=True, slots=True)
class Wordings:
    """Ways to type a question that fit any topic."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    sums: tuple[str, ...]
    rewrites: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """Questions that the model cannot answer, and the kind ways to say so."""

    answer: tuple[str, ...]
    ask: tuple[str, ...]
    things: tuple[str, ...]
    frames: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    topics: tuple[Topic, ...]
    styles: tuple[Style, ...]
    neutral: tuple[str, ...]
    unknown: Unknown
    passages: tuple[str, ...]
    wordings: Wordings


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question, the turns before it, and words of which the answer needs one."""

    ask: str
    says: tuple[str, ...]
    system: str | None = None
    turns: tuple[str, ...] = ()


def expand(pattern: str) -> list[str]:
    """All wordings that a pattern stands for."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in product(*choices)]


def read_corpus() -> Corpus:
    topics: list[Topic] = []
    for group in TOPIC_FILES:
        content = _read(TEXT / f"{group}.toml")
        topics += [_topic(entry, group) for entry in content.get("topic", [])]
        for table in content.get("table", []):
            topics += _rows(table, group)
    styles, unknown = _read(TEXT / "styles.toml"), _read(TEXT / "unknown.toml")
    return Corpus(
        topics=tuple(topics),
        styles=tuple(_style(entry) for entry in styles["style"]),
        neutral=tuple(styles["neutral"]),
        unknown=Unknown(**{key: tuple(value) for key, value in unknown.items()}),
        passages=tuple(_read(TEXT / "passages.toml")["passages"]),
        wordings=_wordings(_read(TEXT / "wordings.toml")),
    )


def read_questions() -> list[Question]:
    return [
        Question(
            ask=entry["ask"],
            says=tuple(entry["says"]),
            system=entry.get("system"),
            turns=tuple(entry.get("turns", ())),
        )
        for entry in _read(HELD_OUT)["question"]
    ]


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _topic(entry: dict[str, Any], group: str, parent: str = "") -> Topic:
    name = entry.get("name", parent)
    return Topic(
        name=name,
        group=group,
        ask=tuple(entry["ask"]),
        answer=tuple(entry["answer"]),
        short=entry.get("short"),
        told=tuple(entry.get("told", ())),
        then=tuple(_topic(follow_up, group, name) for follow_up in entry.get("then", ())),
        weight=entry.get("weight", 1.0),
    )


def _rows(table: dict[str, Any], group: str) -> list[Topic]:
    """One topic per row of a table, named `table:row`; the table's weight is shared out evenly."""
    topics = []
    for row in table["rows"]:

        def fill(text: str, row: list[str] = row) -> str:
            for column, value in zip(table["columns"], row, strict=True):
                text = text.replace(f"<{column}>", value)
            return text

        topics.append(
            Topic(
                name=f"{table['name']}:{row[0]}",
                group=group,
                ask=tuple(fill(text) for text in table["ask"]),
                answer=tuple(fill(text) for text in table["answer"]),
                weight=table["weight"] / len(table["rows"]),
            )
        )
    return topics


def _style(entry: dict[str, Any]) -> Style:
    return Style(
        name=entry["name"],
        system=tuple(entry["system"]),
        inline=tuple(entry["inline"]),
        again=tuple(entry["again"]),
        weight=entry.get("weight", 1.0),
        wrap=entry.get("wrap"),
        first_sentence=entry.get("first_sentence", False),
        answers={key: tuple(value) for key, value in entry.get("answers", {}).items()},
    )


def _wordings(content: dict[str, Any]) -> Wordings:
    return Wordings(
        openings=tuple(content["openings"]),
        closings=tuple(content["closings"]),
        sums=tuple(content["sums"]),
        rewrites=tuple(
            (re.compile(entry["from"], re.IGNORECASE), tuple(entry["to"]))
            for entry in content["rewrite"]
        ),
    )
