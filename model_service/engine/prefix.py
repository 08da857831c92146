"""The names of cached blocks: a digest of the block's tokens and of all that stand before them.

Keys and values of a token depend on every token before it, so two blocks may stand for each other
exactly when their chains of digests are equal.
"""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 16  # bytes: no two chains of any real load meet by chance


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], block_size: int, count: int
) -> None:
    """Appends to `digests`, those of the first full blocks of `tokens`, until there are `count`.

    Each is BLAKE2b over the digest before it (nothing, for the first) and the block's token ids as
    32-bit integers.
    """
    parent = digests[-1] if digests else b""
    for index in range(len(digests), count):
        block = array("i", tokens[index * block_size : (index + 1) * block_size])
        parent = hashlib.blake2b(parent + block.tobytes(), digest_size=DIGEST_SIZE).digest()
        digests.append(parent)
