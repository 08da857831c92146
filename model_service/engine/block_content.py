"""What stands in a block of the cache: its tokens, and a digest of them and of all before them.

Keys and values of a token depend on every token before it, so two blocks may stand for each other
exactly when their chains of digests are equal, and up to the token in which two blocks differ when
the chains before them are.
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
    """What stands before the first block: sequences of different scopes have nothing in common."""
    return hashlib.blake2b(scope.encode(), digest_size=DIGEST_SIZE, person=b"scope").digest()


def pack(tokens: Sequence[int]) -> bytes:
    """The form in which token ids are compared."""
    return array("i", tokens).tobytes()


def extend_contents(
    contents: list[BlockContent], tokens: Sequence[int], block_size: int, count: int, scope: str
) -> None:
    """Appends to `contents`, of the first full blocks of `tokens`, until there are `count`."""
    for index in range(len(contents), count):
        parent = contents[-1].digest if contents else root(scope)
        block = tokens[index * block_size : (index + 1) * block_size]
        contents.append(BlockContent.of(parent, block))


class ContentIndex:
    """Finds, of the contents that stand behind the same one, that which agrees for longest.

    Among sorted strings it is one of the two neighbours of the string that is looked for.
    """

    def __init__(self) -> None:
        # By parent: sorted pairs of tokens and digest.
        self._behind: dict[bytes, list[tuple[bytes, bytes]]] = {}

    def add(self, content: BlockContent) -> None:
        """Makes a content known that is not yet."""
        siblings = self._behind.setdefault(content.parent, [])
        bisect.insort(siblings, (content.tokens, content.digest))

    def remove(self, content: BlockContent) -> None:
        """Forgets a content that is known."""
        siblings = self._behind[content.parent]
        del siblings[bisect.bisect_left(siblings, (content.tokens, content.digest))]
        if not siblings:
            del self._behind[content.parent]

    def closest(self, parent: bytes, tokens: bytes) -> tuple[bytes, int]:
        """The digest of the content that begins most like `tokens`, and how many tokens agree.

        Nothing, and 0, where none agrees in the first.
        """
        siblings = self._behind.get(parent, [])
        place = bisect.bisect_left(siblings, (tokens,))
        neighbours = siblings[max(0, place - 1) : place + 1]
        common = [(_common(tokens, known), digest) for known, digest in neighbours]
        most, digest = max(common, default=(0, b""))
        return (digest, most) if most else (b"", 0)


def _common(first: bytes, second: bytes) -> int:
    """How many tokens two contents have in common at their beginnings."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return (
        next((at for at, (one, other) in enumerate(pairs) if one != other), shorter) // _TOKEN_SIZE
    )
