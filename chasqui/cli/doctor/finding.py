"""One line of the doctor's report."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a finding is marked. Only WRONG makes the exit status 1."""

    FINE = "fine"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """A checked part of the set-up, what was found, and the remedy if something is amiss."""

    verdict: Verdict
    subject: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        remedy = f". To fix: {self.fix}" if self.fix else ""
        return f"{self.verdict:5}  {self.subject:11}  {self.text}{remedy}"


def fine(subject: str, text: str) -> Finding:
    return Finding(Verdict.FINE, subject, text)


def remark(subject: str, text: str) -> Finding:
    return Finding(Verdict.NOTE, subject, text)


def wrong(subject: str, text: str, fix: str) -> Finding:
    return Finding(Verdict.WRONG, subject, text, fix)
