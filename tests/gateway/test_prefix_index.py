"""The index of prefixes, against a plain list of what was added."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.replicas.prefix_index import BLOCK, PrefixIndex, block_digests

# Few different blocks, so that texts share beginnings and also blocks at other places.
texts = st.lists(st.sampled_from([1, 2, 3]), max_size=6).map(
    lambda blocks: [token for block in blocks for token in [block] * BLOCK]
)


def common_blocks(one: list[int], other: list[int]) -> int:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len([*equal]) // BLOCK


@given(st.lists(texts, max_size=8), texts)
def test_with_room_it_knows_the_longest_common_beginning(
    added: list[list[int]], asked: list[int]
) -> None:
    index = PrefixIndex(1000)
    for ids in added:
        index.add(block_digests(ids))
    longest = max((common_blocks(ids, asked) for ids in added), default=0)
    assert index.known_blocks(block_digests(asked)) == longest


@given(st.lists(texts, max_size=12), st.integers(0, 8), texts)
def test_it_never_holds_more_than_its_capacity_nor_what_was_not_added(
    added: list[list[int]], capacity: int, asked: list[int]
) -> None:
    index = PrefixIndex(capacity)
    for ids in added:
        index.add(block_digests(ids))
        assert len(index) <= capacity
        assert index.known_blocks(block_digests(ids)) == min(capacity, len(ids) // BLOCK)
    longest = max((common_blocks(ids, asked) for ids in added), default=0)
    assert index.known_blocks(block_digests(asked)) <= longest


@given(texts, st.integers(0, 8))
def test_a_smaller_index_keeps_beginnings(ids: list[int], capacity: int) -> None:
    index = PrefixIndex(1000)
    index.add(block_digests(ids))
    index.resize(capacity)
    assert index.known_blocks(block_digests(ids)) == min(capacity, len(ids) // BLOCK)


def test_what_one_scope_knows_no_other_does() -> None:
    ids, index = list(range(BLOCK)), PrefixIndex(1000)
    index.add(block_digests(ids, "ada"))
    known = [index.known_blocks(block_digests(ids, scope)) for scope in ("ada", "ben", "")]
    assert known == [1, 0, 0]


def test_only_full_blocks_have_digests() -> None:
    ids = list(range(2 * BLOCK - 1))
    assert block_digests(ids) == block_digests(ids[:BLOCK])
    assert block_digests(ids[1:]) != block_digests(ids[: BLOCK + 1])
