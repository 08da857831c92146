"""The random numbers of sampling: a function of (seed, position) and nothing else.

A counter-based generator (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011) needs no state to carry over when a sequence is preempted or moves to another replica.
Changing anything here changes every seeded answer ever given.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit values in 64-bit words, so that products keep their carry

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = np.arange(10, dtype=np.uint64)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> Words:
    """The first of the four 32-bit words that Philox4x32-10 gives for each counter and key."""
    # Words 0 and 2 as one array, 1 and 3 as another: calls, not numbers, are what takes time here.
    even, odd = np.stack(counter[::2]), np.stack(counter[1::2])
    keys = (np.stack(key) + _ROUNDS[:, np.newaxis, np.newaxis] * _WEYL) & _LOW
    for round_key in keys:
        products = (even * _MULTIPLIERS)[::-1]
        even, odd = (products >> _HALF) ^ odd ^ round_key, products & _LOW
    words: Words = even[0]
    return words


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
