from itertools import takewhile

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_service.engine.block_content import BlockContent, extend_contents
from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.model.attention.backend import PROBE_BLOCK

# Two parents, and tokens that begin alike.
contents = st.builds(
    BlockContent.of,
    st.sampled_from([b"x", b"y"]),
    st.lists(st.integers(1, 2), min_size=1, max_size=4),
)


def agreeing(first: bytes, second: bytes) -> int:
    """How many tokens of 32 bits two contents have in common at their beginnings."""
    both = zip(memoryview(first).cast("i"), memoryview(second).cast("i"), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], both)])


class PoolUse(RuleBasedStateMachine):
    """Arbitrary operations: no block is lost, given out twice, or known by another's content."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(total=12, block_size=4)
        self.held: list[list[int]] = []
        self.content: dict[int, BlockContent] = {}  # by which each block was last published

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        if count > self.pool.free_count:
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
        else:
            blocks = self.pool.allocate(count)
            self.held.append(blocks)
            for block in blocks:
                self.content.pop(block, None)

    @rule(data=st.data(), content=contents)
    def publish(self, data: st.DataObject, content: BlockContent) -> None:
        held = [block for blocks in self.held for block in blocks]
        if held:
            block = data.draw(st.sampled_from(held))
            self.content[block] = content
            self.pool.publish(block, content)
            [known] = self.pool.match([content.digest])
            assert self.content[known] == content

    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            digests = [self.content[block].digest for block in blocks if block in self.content]
            self.pool.invalidate(blocks)
            assert not set(self.pool.match(digests)) & set(blocks)

    @rule(wanted=st.lists(contents, max_size=3, unique=True))
    def share(self, wanted: list[BlockContent]) -> None:
        blocks = self.pool.match(content.digest for content in wanted)
        free = self.pool.free_besides(blocks)
        self.pool.share(blocks)
        assert self.pool.free_count == free
        assert [self.content[block] for block in blocks] == wanted[: len(blocks)]
        self.held.append(blocks)

    @rule(wanted=contents)
    def look_for_the_closest(self, wanted: BlockContent) -> None:
        block, common = self.pool.closest(wanted.parent, wanted.tokens)
        if block is not None:
            assert self.content[block].parent == wanted.parent
            assert common == agreeing(self.content[block].tokens, wanted.tokens)
        known = [
            content
            for content in self.content.values()
            if content.parent == wanted.parent and self.pool.match([content.digest])
        ]
        assert common == max((agreeing(each.tokens, wanted.tokens) for each in known), default=0)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.free(blocks)
            if blocks and not any(blocks[-1] in others for others in self.held):
                with pytest.raises(ValueError, match="is not taken"):
                    self.pool.free(blocks)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.free_count + len(held) == self.pool.total
        assert held <= set(range(1, 13))
        assert PROBE_BLOCK not in held
        assert 0 <= self.pool.cached_count <= self.pool.free_count


TestPoolUse = PoolUse.TestCase


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(total=4, block_size=4).blocks_for(tokens) == blocks


def published(pool: BlockPool, contents: list[BlockContent]) -> list[int]:
    blocks = pool.allocate(len(contents))
    for block, content in zip(blocks, contents, strict=True):
        pool.publish(block, content)
    return blocks


def known(pool: BlockPool, contents: list[BlockContent]) -> int:
    """How many of a sequence's first blocks the pool has."""
    return len(pool.match(content.digest for content in contents))


def chain(*blocks: int) -> list[BlockContent]:
    """Contents of a sequence of full blocks, each of one token all along."""
    contents: list[BlockContent] = []
    tokens = [token for token in blocks for _ in range(4)]
    extend_contents(contents, tokens, 4, len(blocks), scope="")
    return contents


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(total=4, block_size=4)
    pool.free(published(pool, chain(1, 2)))
    pool.allocate(2)
    assert pool.cached_count == 2
    assert known(pool, chain(1, 2)) == 2


def test_ends_are_evicted_before_beginnings() -> None:
    pool = BlockPool(total=3, block_size=4)
    pool.free(published(pool, chain(1, 2, 3)))
    for left in (2, 1, 0):
        pool.allocate(1)
        assert known(pool, chain(1, 2, 3)) == left


def test_a_block_that_was_used_again_is_evicted_last() -> None:
    pool = BlockPool(total=2, block_size=4)
    pool.free(published(pool, chain(1)))
    pool.free(published(pool, chain(2)))
    again = pool.match(content.digest for content in chain(1))
    pool.share(again)
    pool.free(again)
    pool.allocate(1)
    assert (known(pool, chain(2)), known(pool, chain(1))) == (0, 1)


def test_a_block_of_another_beginning_is_another_block() -> None:
    assert chain(1, 3)[1].tokens == chain(2, 3)[1].tokens
    assert chain(1, 3)[1].digest != chain(2, 3)[1].digest
