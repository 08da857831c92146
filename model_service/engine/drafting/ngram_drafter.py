"""Drafts from the text itself: the tokens that followed its last n-gram before."""

from dataclasses import dataclass, field

from model_service.engine.sequence import Sequence

NGRAM = 3  # tokens that must have stood together before


@dataclass(slots=True)
class _Index:
    """The last position of a follower for each n-gram of a text."""

    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    end: int = NGRAM  # the next follower to be entered


class NgramDrafter:
    """Drafts the tokens that followed the last n-gram at its previous place in the text.

    Prompt lookup decoding (Saxena, 2023): answers repeat names, quotations and lists of their
    prompts. Past the end of the text, a draft starts over: a repetition goes on repeating.
    """

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        tokens = sequence.tokens
        index = self._indices.setdefault(sequence, _Index())
        for follower in range(index.end, len(tokens)):
            index.followers[tuple(tokens[follower - NGRAM : follower])] = follower
        index.end = max(index.end, len(tokens))
        begin = index.followers.get(tuple(tokens[-NGRAM:]))
        if begin is None:
            return []
        following = tokens[begin : begin + most]
        while len(following) < most:
            following += following[: most - len(following)]
        return following

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)
