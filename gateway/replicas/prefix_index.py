"""The gateway's estimate of a replica's prefix cache: the token blocks that were lately sent to it
or generated there. It costs no call, and a wrong estimate only makes a replica compute a prompt
that another one has in its cache.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16  # tokens
DIGEST_SIZE = 12  # bytes


def block_digests(ids: Sequence[int], scope: str = "") -> list[bytes]:
    """A digest for each full block of `ids`, of the cache scope and all tokens up to its end."""
    digests: list[bytes] = []
    previous = scope.encode()
    packed = array("I", ids)
    for begin in range(0, len(ids) - BLOCK + 1, BLOCK):
        block = packed[begin : begin + BLOCK].tobytes()
        previous = hashlib.blake2b(previous + block, digest_size=DIGEST_SIZE).digest()
        digests.append(previous)
    return digests


class PrefixIndex:
    """The block digests used last, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, digests: Sequence[bytes]) -> None:
        """Marks these blocks, of one text and in its order, as used now."""
        # Reversed, so that the end of a text is evicted first, as in the replica: a block is of no
        # use without those before it.
        for digest in reversed(digests):
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        self._shrink()

    def known_blocks(self, digests: Sequence[bytes]) -> int:
        """The number of known blocks at the beginning of a text."""
        for number, digest in enumerate(digests):
            if digest not in self._digests:
                return number
        return len(digests)

    def resize(self, capacity: int) -> None:
        self._capacity = capacity
        self._shrink()

    def clear(self) -> None:
        self._digests.clear()

    def _shrink(self) -> None:
        while len(self._digests) > self._capacity:
            self._digests.popitem(last=False)
