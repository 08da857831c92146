"""One step's work, as the scheduler decides it and the engine runs it."""

from dataclasses import dataclass, field

from model_service.engine.sequence import Sequence
from model_service.model.attention.backend import BlockCopy


@dataclass(slots=True)  # not frozen: that makes it three times as slow to create, 256 times a step
class Chunk:
    """Tokens of one sequence that a step computes: those from `begin` to `end`.

    The ones before `begin` are in the cache. Behind the sequence's last token, a chunk may hold
    `drafts`, guesses of what comes next.
    """

    sequence: Sequence
    begin: int
    end: int
    drafts: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that it adds to the step."""
        return self.end - self.begin + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work; the blocks that it writes to are allocated."""

    chunks: list[Chunk]
    decode_rows: int  # chunks that only append to an answer; they come first
    drafted_tokens: int  # behind those
    prompt_tokens: int  # tokens of all other chunks
    copies: list[BlockCopy]  # to be made before anything is written
    draft_seconds: float = 0.0  # that the draft model took before
