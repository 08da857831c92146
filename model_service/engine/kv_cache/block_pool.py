"""The blocks of the KV cache: which ones are held, free or cached.

A block that several sequences share has one holder for each. A block without a holder is empty, or
cached: its content is known, and it may be shared again until it is evicted. Block 0 is never
handed out, because the probe step writes there. When no sequence runs, all others are free.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from model_service.engine.block_content import BlockContent, ContentIndex
from model_service.model.attention.backend import PROBE_BLOCK


class BlockPool:
    """Hands out blocks 1 to `total`: empty ones first, then the cached one unused for longest."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        # Taken from the end: the newest freed may still be in a processor's cache.
        self._empty = list(range(total, PROBE_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # without holders; oldest first
        self._holders = [0] * (total + 1)
        self._by_digest: dict[bytes, int] = {}
        self._contents: dict[int, BlockContent] = {}  # the reverse
        self._index = ContentIndex()

    @property
    def free_count(self) -> int:
        """Blocks without a holder, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def cached_count(self) -> int:
        """Blocks without a holder whose content is known."""
        return len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` blocks whose content is undefined.

        Raises:
            MemoryError: fewer are free; nothing was taken.
        """
        if count > self.free_count:
            raise MemoryError(f"{count} blocks wanted, {self.free_count} free")
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `digests`; they are not held yet."""
        blocks = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def closest(self, parent: bytes, tokens: bytes) -> tuple[int | None, int]:
        """The known block behind `parent` that agrees with `tokens` longest, and in how many.

        The block is not reserved for the caller: the next step must copy it before it writes.
        """
        digest, common = self._index.closest(parent, tokens)
        return (self._by_digest[digest], common) if common else (None, 0)

    def free_besides(self, blocks: Iterable[int]) -> int:
        """Blocks that would still be free if `blocks` were shared."""
        return self.free_count - sum(not self._holders[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that `match` found."""
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1

    def publish(self, block: int, content: BlockContent) -> None:
        """Makes a held block known by `content`, its first tokens, which are written.

        Its former content is forgotten. If another block has the same content, this one stays
        unknown.
        """
        self._forget(block)
        if content.digest not in self._by_digest:
            self._by_digest[content.digest] = block
            self._contents[block] = content
            self._index.add(content)

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Makes held blocks unknown, because their content is not valid."""
        for block in blocks:
            self._forget(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Gives a sequence's blocks back, in their order in it.

        The last of them will be evicted first: a prefix is shared by more sequences than the
        blocks behind it, and these are useless without it.

        Raises:
            ValueError: a block is not held; those behind it were given back.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is not taken")
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._contents:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        if (content := self._contents.pop(block, None)) is not None:
            del self._by_digest[content.digest]
            self._index.remove(content)
