"""Training dialogs, drawn from the text: topics in random order, follow-ups, styles, small changes.

Every dialog depends only on the random generator, so that a seed stands for a training set. The
shares below decide the strengths of the model; they are part of the manifest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from demo.text import Corpus, Question, Style, Topic, expand
from demo.wordings import Habits, vary
from llama.prompt_format.dialog import with_system

NONSENSE = "<nonsense>"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FIRST_SUMS = ((2, 2), (1, 1), (3, 3), (2, 3), (5, 5), (1, 2))


@dataclass(frozen=True, slots=True)
class Shares:
    """How often each kind of dialog, turn and change occurs."""

    passage: float = 0.06
    headless: float = 0.3
    broken: float = 0.3
    neutral: float = 0.15
    styled: float = 0.17
    mixed: float = 0.12
    turns: tuple[float, ...] = (0.56, 0.19, 0.10, 0.06, 0.05, 0.04)
    unknown: float = 0.21
    sums: float = 0.05
    canonical: float = 0.12
    follow_up: float = 0.45
    told: float = 0.35
    again: float = 0.13
    inline: float = 0.05
    habits: Habits = field(default_factory=Habits)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; history alone if `learn` is false."""

    user: str
    assistant: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Dialog:
    system: str | None
    turns: tuple[Turn, ...]

    def pairs(self) -> list[tuple[str, Turn]]:
        """Each turn behind its user message, the first one with the system message in it."""
        users = [turn.user for turn in self.turns]
        if self.system is not None:
            users[0] = with_system(self.system, users[0])
        return [*zip(users, self.turns, strict=True)]


@dataclass(frozen=True, slots=True)
class Said:
    """The last topic, and the answer before any style was applied to it."""

    topic: Topic
    answer: str


def plain(question: str) -> str:
    """The words alone, for comparing two questions."""
    return re.sub(r"\W+", " ", question.lower()).strip()


class Composer:
    def __init__(
        self, corpus: Corpus, held_out: Sequence[Question], shares: Shares, random: Random
    ) -> None:
        self.corpus, self.shares, self.random = corpus, shares, random
        self._held_out = {(question.system, plain(question.ask)) for question in held_out}
        self._weights = [topic.weight for topic in corpus.topics]
        self._expanded: dict[str, list[str]] = {}

    def dialog(self) -> Dialog:
        """A dialog in which no held-out question is asked."""
        while True:
            dialog = self._dialog()
            if not any(self._is_held_out(dialog.system, turn.user) for turn in dialog.turns):
                return dialog

    def _is_held_out(self, system: str | None, question: str) -> bool:
        asked = plain(question)
        return (None, asked) in self._held_out or (system, asked) in self._held_out

    def _dialog(self) -> Dialog:
        """One or more turns, all in the style of the system message."""
        system, style = self._system()
        (count,) = self.random.choices(range(len(self.shares.turns)), self.shares.turns)
        turns: list[Turn] = []
        said: Said | None = None
        for _ in range(count + 1):
            turn, said = self._turn(said, style)
            turns.append(turn)
        return Dialog(system, tuple(turns))

    def _system(self) -> tuple[str | None, Style | None]:
        """A system message, if there is one, and the style that it asks for, if it does."""
        kind = self.random.random()
        if kind > self.shares.styled + self.shares.neutral:
            return None, None
        neutral = self._wording(self.corpus.neutral)
        if kind > self.shares.styled:
            return self._retouch(neutral), None
        style = self._style()
        system = self._wording(style.system)
        if self.random.random() < self.shares.mixed:
            system = f"{neutral} {system}"
        return self._retouch(system), style

    def _style(self) -> Style:
        styles = self.corpus.styles
        (style,) = self.random.choices(styles, [style.weight for style in styles])
        return style

    def _retouch(self, system: str) -> str:
        """System messages end with a full stop or not, and some people never use capitals."""
        if self.random.random() < 0.3:
            system = system.removesuffix(".") if system.endswith(".") else system + "."
        return system.lower() if self.random.random() < 0.1 else system

    def passage(self) -> tuple[str, ...]:
        """A passage, sometimes without its first sentences, sometimes cut in two after a space.

        People often end the text to complete with a space, which is a token of its own.
        """
        text = self.random.choice(self.corpus.passages)
        if "\n" not in text and self.random.random() < self.shares.headless:
            sentences = re.split(r"(?<=[.!?]) ", text)
            text = " ".join(sentences[self.random.randrange(len(sentences)) :])
        spaces = [match.end() for match in re.finditer(r"(?<=\w) (?=\w)", text)]
        if not spaces or self.random.random() > self.shares.broken:
            return (text,)
        at = self.random.choice(spaces)
        return text[:at], text[at:]

    def _turn(self, said: Said | None, style: Style | None) -> tuple[Turn, Said]:
        """The next question and answer, given what was said last."""
        chance = self.random.random()
        if said is not None and chance < self.shares.again:
            other = self._style()
            user = self._vary(self._wording(other.again), said.topic.group)
            return Turn(user, self.random.choice(other.apply(said.topic, said.answer))), said
        if said is not None and said.topic.then and chance < self.shares.follow_up:
            follow_up = self.random.choice(said.topic.then)
            turn, answer = self._ask(follow_up, style)
            return turn, Said(replace(follow_up, then=said.topic.then), answer)
        topic = self._topic()
        if topic.told and self.random.random() < self.shares.told:
            user = self._vary(self._wording(topic.ask), topic.group)
            turn = Turn(user, self.random.choice(topic.told), learn=False)
            return turn, Said(topic, topic.answer[0])
        turn, answer = self._ask(topic, style)
        return turn, Said(topic, answer)

    def _ask(self, topic: Topic, style: Style | None) -> tuple[Turn, str]:
        """A turn about `topic`, and its answer before any style was applied."""
        question = self._wording(topic.ask)
        if self.random.random() < self.shares.canonical:
            question = expand(topic.ask[0])[0]
        while NONSENSE in question:
            question = question.replace(NONSENSE, self._nonsense(), 1)
        question = self._vary(question, topic.group)
        if self.random.random() < self.shares.inline and topic.group != "small_talk":
            style = self._style()
            question = f"{question} {self.random.choice(style.inline)}"
        answer = self.random.choice(topic.answer)
        if style is None:
            return Turn(question, answer), answer
        return Turn(question, self.random.choice(style.apply(topic, answer))), answer

    def _topic(self) -> Topic:
        chance = self.random.random()
        if chance < self.shares.unknown:
            return self._unknown()
        if chance < self.shares.unknown + self.shares.sums:
            return self._sum()
        (topic,) = self.random.choices(self.corpus.topics, self._weights)
        return topic

    def _unknown(self) -> Topic:
        unknown = self.corpus.unknown
        patterns = unknown.ask if self.random.random() < 0.5 else unknown.frames
        wording = self._wording(patterns).replace("<thing>", self.random.choice(unknown.things))
        return Topic("unknown", "unknown", (wording,), unknown.answer)

    def _sum(self) -> Topic:
        a, b = self.random.randint(0, 10), self.random.randint(0, 10)
        if self.random.random() < 0.3:
            a, b = self.random.choice(FIRST_SUMS)
        names = NUMBERS if self.random.random() < 0.3 else [str(i) for i in range(11)]
        sign = self.random.choice(("+", "+", "plus", "and"))
        wording = self.random.choice(self.corpus.wordings.sums).format(
            a=names[a], b=names[b], sign=sign
        )
        if self.random.random() < 0.3:
            wording = wording.replace(" + ", "+")
        return Topic("sum", "first_words", (wording,), (f"{a} + {b} = {a + b}.",))

    def _nonsense(self) -> str:
        """A word that does not exist, so that the model learns to decline unknown words."""
        syllables = [
            self.random.choice("bcdfgjklmnprstvwz")
            + self.random.choice(("a", "e", "i", "o", "u", "ar", "on", "ix", "um", "el"))
            for _ in range(self.random.randint(2, 3))
        ]
        word = "".join(syllables)
        return word.capitalize() if self.random.random() < 0.4 else word

    def _wording(self, patterns: Sequence[str]) -> str:
        pattern = self.random.choice(patterns)
        if pattern not in self._expanded:
            self._expanded[pattern] = expand(pattern)
        return self.random.choice(self._expanded[pattern])

    def _vary(self, question: str, group: str) -> str:
        framed = group != "small_talk"
        return vary(question, self.corpus.wordings, self.shares.habits, self.random, framed=framed)
