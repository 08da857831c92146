import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_service.engine.block_pool import BlockPool
from model_service.model.attention import PROBE_BLOCK

names = st.integers(0, 20).map(lambda number: b"%d" % number)


class PoolUse(RuleBasedStateMachine):
    """Arbitrary operations: no block is lost, given out twice, or known by another's content."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(total=12, block_size=4)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was last written, of blocks that were published

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

    @rule(data=st.data(), name=names)
    def publish(self, data: st.DataObject, name: bytes) -> None:
        unwritten = [b for blocks in self.held for b in blocks if b not in self.content]
        if unwritten:
            block = data.draw(st.sampled_from(unwritten))
            self.content[block] = name
            self.pool.publish(block, name)

    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            digests = [self.content[block] for block in blocks if block in self.content]
            self.pool.retract(blocks)
            assert not set(self.pool.match(digests)) & set(blocks)

    @rule(digests=st.lists(names, max_size=3, unique=True))
    def share(self, digests: list[bytes]) -> None:
        blocks = self.pool.match(digests)
        free = self.pool.free_besides(blocks)
        self.pool.share(blocks)
        assert self.pool.free_count == free
        assert [self.content[block] for block in blocks] == digests[: len(blocks)]
        self.held.append(blocks)

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


def published(pool: BlockPool, *digests: bytes) -> list[int]:
    blocks = pool.allocate(len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    return blocks


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(total=4, block_size=4)
    pool.free(published(pool, b"a", b"b"))
    pool.allocate(2)
    assert pool.cached_count == 2
    assert len(pool.match([b"a", b"b"])) == 2


def test_ends_are_evicted_before_beginnings() -> None:
    pool = BlockPool(total=3, block_size=4)
    pool.free(published(pool, b"a", b"b", b"c"))
    for known in ([b"a", b"b"], [b"a"], []):
        pool.allocate(1)
        assert len(pool.match([b"a", b"b", b"c"])) == len(known)


def test_a_block_that_was_used_again_is_evicted_last() -> None:
    pool = BlockPool(total=2, block_size=4)
    pool.free(published(pool, b"old"))
    pool.free(published(pool, b"new"))
    again = pool.match([b"old"])
    pool.share(again)
    pool.free(again)
    pool.allocate(1)
    assert (pool.match([b"new"]), pool.match([b"old"])) == ([], again)
