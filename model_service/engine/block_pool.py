"""Who owns which block of the KV cache.

Block 0 is never handed out: the probe step writes there. When no
sequence runs, all others are free.
"""

from collections.abc import Iterable

PROBE_BLOCK = 0


class BlockPool:
    """Hands out blocks 1 to `total`; the newest freed goes first, as it may still be in a cache."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total, PROBE_BLOCK, -1))
        self._taken: set[int] = set()

    @property
    def free_count(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks.

        Raises:
            MemoryError: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back.

        Raises:
            ValueError: a block was not taken; those before it were given back.
        """
        for block in blocks:
            if block not in self._taken:
                raise ValueError(f"block {block} is not taken")
            self._taken.remove(block)
            self._free.append(block)
