"""Variations of a question: other words, case, greetings, typing errors.

The topics hold the meaning of questions. This module varies their wording, alike for all topics, so
that a new question comes in habits that the model already knows. The words are in
text/wordings.toml.
"""

from dataclasses import dataclass
from random import Random

from demo.text import Wordings


@dataclass(frozen=True, slots=True)
class Habits:
    """How often a question is typed in each of these ways."""

    rewrite: float = 0.30
    lower: float = 0.35
    bare: float = 0.35
    opening: float = 0.10
    closing: float = 0.07
    typo: float = 0.06
    omission: float = 0.06


def vary(question: str, wordings: Wordings, habits: Habits, random: Random, *, framed: bool) -> str:
    """A variation of the question; only if `framed`, with words before and after it."""
    if random.random() < habits.rewrite:
        question = rewrite(question, wordings, random)
    if random.random() < habits.bare:
        question = question.rstrip("?.!") or question
    if framed and random.random() < habits.opening:
        opening = random.choice(wordings.openings)
        keep = opening.endswith(("! ", ". ")) or question.startswith(("I ", "I'"))
        question = opening + (question if keep else question[:1].lower() + question[1:])
    if framed and random.random() < habits.closing:
        question += random.choice(wordings.closings)
    if random.random() < habits.omission:
        question = omit(question, random)
    if random.random() < habits.lower:
        question = question.lower()
    return mistype(question, random) if random.random() < habits.typo else question


def rewrite(question: str, wordings: Wordings, random: Random) -> str:
    """The question in another construction, if one is known."""
    for pattern, forms in wordings.rewrites:
        if match := pattern.match(question):
            parts = match.groupdict()
            if "v" in parts:
                parts["v"] = parts["v"].lower()
            words = random.choice(forms).format(**parts)
            return words[:1].upper() + words[1:]
    return question


def omit(question: str, random: Random) -> str:
    """The question without one of its short words, which rarely carry the meaning."""
    words = question.split(" ")
    short = [i for i, word in enumerate(words) if word.isalpha() and len(word) < 4]
    if len(words) > 3 and short:
        del words[random.choice(short)]
    return " ".join(words)


def mistype(question: str, random: Random) -> str:
    """One longer word loses a letter or has two of them swapped."""
    words = question.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return question
    index = random.choice(long)
    word, at = words[index], random.randint(1, len(words[index]) - 2)
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[index] = random.choice((swapped, word[:at] + word[at + 1 :]))
    return " ".join(words)
