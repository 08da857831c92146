"""The content of a cache block: its tokens, and a digest of them and of all tokens before them.

Keys and values of a token depend on every token before it. So two blocks are interchangeable if
their digests are equal; if only the digests of the blocks before them are equal, they are so up to
the first token that differs.
"""

import bisect
import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

DIGEST_SIZE = 16  # bytes: no two chains of any real load meet by chance
_TOKEN_SIZE = array("i").itemsize  # bytes


class BlockContent(NamedTuple):
    """The tokens of a block, or the first of them, and where they stand."""

    parent: bytes  # digest of the block before, or the scope's root
    tokens: bytes  # ids as 32-bit integers
    digest: bytes  # BLAKE2b over both

    @classmethod
    def of(cls, parent: bytes, tokens: Sequence[int]) -> "BlockContent":
        packed = pack(tokens)
        digest = hashlib.blake2b(parent + packed, digest_size=DIGEST_SIZE).digest()
        return cls(parent, packed, digest)


def root(scope: str) -> bytes:
    """The parent of a first block; it differs by scope, so different scopes share no block."""
    return hashlib.blake2b(scope.encode(), digest_size=DIGEST_SIZE, person=b"scope").digest()


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids in the form in which they are compared."""
    return array("i", tokens).tobytes()


def extend_contents(
    contents: list[BlockContent], tokens: Sequence[int], block_size: int, count: int, scope: str
) -> None:
    """Extends `contents` to the first `count` full blocks of `tokens`."""
    for index in range(len(contents), count):
        parent = contents[-1].digest if contents else root(scope)
        block = tokens[index * block_size : (index + 1) * block_size]
        contents.append(BlockContent.of(parent, block))


class ContentIndex:
    """Finds the content with the longest common prefix among those that have the same parent.

    In a sorted list, that is one of the two neighbours of the content looked for.
    """

    def __init__(self) -> None:
        # Sorted pairs of tokens and digest.
        self._by_parent: dict[bytes, list[tuple[bytes, bytes]]] = {}

    def add(self, content: BlockContent) -> None:
        """Adds a content that is not in the index."""
        siblings = self._by_parent.setdefault(content.parent, [])
        bisect.insort(siblings, (content.tokens, content.digest))

    def remove(self, content: BlockContent) -> None:
        """Removes a content that is in the index."""
        siblings = self._by_parent[content.parent]
        del siblings[bisect.bisect_left(siblings, (content.tokens, content.digest))]
        if not siblings:
            del self._by_parent[content.parent]

    def closest(self, parent: bytes, tokens: bytes) -> tuple[bytes, int]:
        """The digest of the content that agrees with `tokens` longest, and in how many tokens.

        An empty digest and 0 if none has the same first token.
        """
        siblings = self._by_parent.get(parent, [])
        index = bisect.bisect_left(siblings, (tokens,))
        neighbours = siblings[max(0, index - 1) : index + 1]
        common = [(_common(tokens, known), digest) for known, digest in neighbours]
        most, digest = max(common, default=(0, b""))
        return (digest, most) if most else (b"", 0)


def _common(first: bytes, second: bytes) -> int:
    """The number of tokens in the common prefix of two contents."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return (
        next((at for at, (one, other) in enumerate(pairs) if one != other), shorter) // _TOKEN_SIZE
    )
