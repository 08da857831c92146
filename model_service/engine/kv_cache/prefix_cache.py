"""Finds the prefix that a sequence shares with others, so that it is not computed again.

A full block that another sequence has computed is shared as it is. A block with some common tokens
at its beginning is copied, and only the tokens behind these are computed. A block that a running
sequence is computing right now is waited for. The first block of a sequence is shared whole or not
at all: all dialogs begin with the same few tokens, and each would copy them from another, or wait
for it.
"""

from collections.abc import Callable
from typing import NamedTuple

from model_service.engine.block_content import (
    BlockContent,
    ContentIndex,
    extend_contents,
    pack,
)
from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.sequence import Sequence


class CachedPrefix(NamedTuple):
    """The blocks that a waiting sequence may take over."""

    blocks: list[int]  # full ones
    copied: int | None  # a block of which the first tokens are the next ones
    tokens: int  # in all of these
    waits_for: bytes | None  # digest of the next block, if a running sequence is computing it


_UNKNOWN = CachedPrefix([], None, 0, None)


class PrefixCache:
    """The contents of the pool's blocks, and those that running sequences are computing."""

    def __init__(self, pool: BlockPool, wake: Callable[[bytes], None], *, enabled: bool) -> None:
        """Calls `wake` with a digest once it is computed, or will not be."""
        self._pool = pool
        self._wake = wake
        self._enabled = enabled
        # Blocks of prompts that running sequences compute, by digest; the last of a prompt may be
        # partly filled.
        self._in_progress: dict[bytes, Sequence] = {}
        self._in_progress_index = ContentIndex()
        # The lengths of those prompts, and their last blocks, if these are partly filled.
        self._tails: dict[Sequence, tuple[int, BlockContent]] = {}

    def find(self, sequence: Sequence) -> CachedPrefix:
        """The prefix that a waiting sequence can take over, now or soon."""
        if not self._enabled:
            return _UNKNOWN
        size, tokens, usable = self._pool.block_size, sequence.tokens, _usable_tokens(sequence)
        self._extend_contents(sequence, len(tokens) // size)
        full = sequence.contents[: usable // size]
        blocks = self._pool.match(content.digest for content in full)
        reach = len(blocks)
        while reach < len(full) and full[reach].digest in self._in_progress:
            reach += 1
        if not reach:
            return _UNKNOWN
        parent = full[reach - 1].digest
        rest = pack(tokens[reach * size : min(usable, (reach + 1) * size)])
        copied, common = self._pool.closest(parent, rest)
        running, ahead = self._in_progress_index.closest(parent, rest)
        waits_for = running if ahead > common else parent if reach > len(blocks) else None
        return CachedPrefix(blocks, copied, len(blocks) * size + common, waits_for)

    def start(self, sequence: Sequence, cached: CachedPrefix) -> None:
        """Records that a sequence starts and computes all blocks that are not cached."""
        sequence.num_published = len(cached.blocks)
        contents = sequence.contents[sequence.num_published :]
        end = len(sequence.tokens)
        if self._enabled and (tail := self._partial_block(sequence, end)) is not None:
            self._tails[sequence] = end, tail
            contents.append(tail)
        for content in contents:
            if content.digest not in self._in_progress:
                self._in_progress[content.digest] = sequence
                self._in_progress_index.add(content)

    def computed(self, sequence: Sequence, end: int) -> None:
        """Publishes the first `end` tokens of a running sequence, which are computed."""
        # The tail first, because a block that is full by now is known by all of its tokens.
        if self._tails and (tail := self._tails.get(sequence)) and end >= tail[0]:
            del self._tails[sequence]
            self._pool.publish(sequence.block_table[tail[0] // self._pool.block_size], tail[1])
            self._settle(sequence, tail[1])
        full = end // self._pool.block_size
        if full > sequence.num_published and self._enabled:
            self._publish(sequence, full)

    def release(self, sequence: Sequence) -> None:
        """Publishes all that a running sequence has computed, before its blocks are freed."""
        end = min(sequence.num_computed, sequence.num_known)
        # The step in flight may be blocks ahead of the published ones.
        is_next = end // self._pool.block_size == sequence.num_published
        if is_next and (part := self._partial_block(sequence, end)):
            self._pool.publish(sequence.block_table[sequence.num_published], part)
        for content in sequence.contents[sequence.num_published :]:
            self._settle(sequence, content)
        if tail := self._tails.pop(sequence, None):
            self._settle(sequence, tail[1])

    def _publish(self, sequence: Sequence, full: int) -> None:
        """Publishes a sequence's first `full` blocks, which are completely written."""
        self._extend_contents(sequence, full)
        for index in range(sequence.num_published, full):
            self._pool.publish(sequence.block_table[index], sequence.contents[index])
            self._settle(sequence, sequence.contents[index])
        sequence.num_published = full

    def _extend_contents(self, sequence: Sequence, full: int) -> None:
        scope, size = sequence.request.cache_scope, self._pool.block_size
        extend_contents(sequence.contents, sequence.tokens, size, full, scope)

    def _partial_block(self, sequence: Sequence, end: int) -> BlockContent | None:
        """The partly filled block at the end of a sequence's first `end` tokens, if any."""
        full = end // self._pool.block_size
        if not self._enabled or not full or end % self._pool.block_size == 0:
            return None
        tokens = sequence.tokens[full * self._pool.block_size : end]
        return BlockContent.of(sequence.contents[full - 1].digest, tokens)

    def _settle(self, sequence: Sequence, content: BlockContent) -> None:
        if self._in_progress.get(content.digest) is sequence:
            del self._in_progress[content.digest]
            self._in_progress_index.remove(content)
            self._wake(content.digest)


def _usable_tokens(sequence: Sequence) -> int:
    """The number of tokens that may come from the cache; logits and scores need the others."""
    # Logits at index i predict the token at position i + 1.
    unscored = sequence.unscored
    needed = unscored if unscored < len(sequence.request.prompt_ids) else len(sequence.tokens)
    return needed - 1
