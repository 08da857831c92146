import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_service.engine.block_pool import PROBE_BLOCK, BlockPool


class PoolUse(RuleBasedStateMachine):
    """Arbitrary operations: no block is lost, given out twice, or taken back twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(total=12, block_size=4)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        if count > self.pool.free_count:
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
        else:
            self.held.append(self.pool.allocate(count))

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.free(blocks)
            if blocks:
                with pytest.raises(ValueError, match="is not taken"):
                    self.pool.free(blocks)

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        held = [block for blocks in self.held for block in blocks]
        assert len(set(held)) == len(held)
        assert self.pool.free_count + len(held) == self.pool.total
        assert set(held) <= set(range(1, 13))
        assert PROBE_BLOCK not in held


TestPoolUse = PoolUse.TestCase


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(total=4, block_size=4).blocks_for(tokens) == blocks
