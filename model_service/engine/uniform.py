"""The random numbers of sampling: a function of (seed, position) and nothing else.

A counter-based generator (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011) needs no state to carry over when a sequence is preempted or moves to another replica.
Changing anything here changes every seeded answer ever given.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit values in 64-bit words, so that products keep their carry

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> Words:
    """The first of the four 32-bit words that Philox4x32-10 gives for each counter and key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> _HALF) ^ c1 ^ k0, (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0


def uniforms(seeds: Words, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for the token at each position of the sequence with each seed.

    Args:
        seeds: [n], any 64-bit values.
        positions: [n], index of the token in its sequence, prompt included.
    """
    zero = np.zeros_like(seeds)
    counter = positions.astype(np.uint64) & _LOW
    words = philox((counter, zero, zero, zero), (seeds & _LOW, seeds >> _HALF))
    return words / np.float64(2**32)
