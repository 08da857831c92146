"""The context that a prompt must fit, and the size of segments that are not encoded yet."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama.prompt_format.dialog import Segment


@dataclass(frozen=True, slots=True)
class Window:
    """The context that a prompt must fit."""

    length: int
    # The most bytes of text that one token stands for; None: unbounded.
    max_token_bytes: int | None = None
    # Whether the tokenizer has a BOS for `Segment.bos`.
    has_bos: bool = True

    def answer_room(self, max_gen_len: int) -> int:
        """Tokens to keep free for an answer of at most `max_gen_len` when turns are dropped."""
        return min(max_gen_len, self.length // 4)

    def least_tokens(self, size: "Size") -> int:
        """A lower bound of the tokens of segments with this size together."""
        if self.max_token_bytes is None:
            return size.control_tokens
        return size.control_tokens - (-size.bytes // self.max_token_bytes)

    def size(self, segments: Sequence[Segment]) -> "Size":
        return Size(
            sum(len(each.text.encode()) for each in segments),
            sum(
                (each.bos and self.has_bos) + each.eos + bool(each.control_token)
                for each in segments
            ),
        )


@dataclass(frozen=True, slots=True)
class Size:
    """The size of segments, or the difference of two."""

    bytes: int  # of the texts
    control_tokens: int

    def plus(self, other: "Size") -> "Size":
        return Size(self.bytes + other.bytes, self.control_tokens + other.control_tokens)

    def minus(self, other: "Size") -> "Size":
        return Size(self.bytes - other.bytes, self.control_tokens - other.control_tokens)
