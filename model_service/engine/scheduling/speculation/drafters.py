"""The interface of sources of drafts. They are in `engine/drafting/`."""

import enum
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from model_service.engine.sequence import Sequence


class Source(enum.StrEnum):
    """A source of drafts."""

    NGRAM = "ngram"
    MODEL = "model"


class DraftCount(NamedTuple):
    """Drafts of one source that steps have checked, in tokens since the start."""

    drafted: int = 0
    accepted: int = 0  # of these


class NgramSource(Protocol):
    """Drafts from the text itself, in next to no time."""

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may follow the sequence's last one."""

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""


class ModelSource(Protocol):
    """Drafts by a small model, which must have computed a sequence's tokens before."""

    @property
    def seconds(self) -> float:
        """The time that it has taken since the start."""

    def backlog(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are still to be computed: at least the last one."""

    def propose(self, wanted: Mapping[Sequence, int], extra: int) -> dict[Sequence, list[int]]:
        """Drafts at most as many tokens as wanted for each sequence.

        Args:
            wanted: numbers of drafts, at least 1.
            extra: most tokens of backlogs that are computed besides those of the last step. A
                sequence whose backlog is longer gets no drafts yet.
        """

    def round_seconds(self, sequences: int) -> float | None:
        """The time of one draft for each of that many sequences; None if unknown yet."""

    def token_seconds(self) -> float:
        """The time of one token of a long backlog; 0 if unknown yet."""

    def forget(self, sequence: Sequence) -> None:
        """Drops all that is held for a sequence that has ended."""
