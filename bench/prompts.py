"""Random prompts, the same for every engine."""

import random

FIRST_ORDINARY_ID = 259  # ids before it are the control and byte pieces of a Llama 2 vocabulary


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` ordinary ids."""
    source, ordinary = random.Random(seed), range(FIRST_ORDINARY_ID, vocab_size)
    return [source.choices(ordinary, k=length) for _ in range(count)]
