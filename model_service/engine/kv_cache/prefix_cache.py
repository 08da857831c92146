"""What a sequence need not compute: the beginning that it has in common with others.

A full block that another one has computed is shared as it is. A block that begins alike, but goes
on in another way or is not full, is copied, and only what stands behind the common tokens is
computed. What a running sequence is just computing is waited for. A sequence's first block is
shared whole or not at all: all dialogs begin with the same few tokens, and each would copy them
from another, or wait for it.
"""

from collections.abc import Callable, Mapping
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
    """What a waiting sequence may take over."""

    blocks: list[int]  # full ones
    copied: int | None  # a block whose first tokens stand behind those
    tokens: int  # in all of these
    waits_for: bytes | None  # digest of more that a running sequence is computing right behind them


_UNKNOWN = CachedPrefix([], None, 0, None)


class PrefixCache:
    """What the pool's blocks hold, and what running sequences are going to write into theirs."""

    def __init__(self, pool: BlockPool, wake: Callable[[bytes], None], *, enabled: bool) -> None:
        """`wake` is told of each awaited digest, when it is computed or never will be."""
        self._pool = pool
        self._wake = wake
        self._enabled = enabled
        # Blocks of prompts that running sequences are going to compute, by digest; a prompt's last
        # one may not be full.
        self._in_progress: dict[bytes, Sequence] = {}
        self._in_progress_index = ContentIndex()
        # The ends of those prompts, and the blocks in which they end, unless these are full.
        self._tails: dict[Sequence, tuple[int, BlockContent]] = {}

    @property
    def in_progress(self) -> Mapping[bytes, Sequence]:
        """Who computes what may be waited for."""
        return self._in_progress

    def find(self, sequence: Sequence) -> CachedPrefix:
        """What a waiting sequence can take over, now or soon."""
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

    def start(self, sequence: Sequence, known: CachedPrefix) -> None:
        """Notes what a sequence that now runs is going to compute: all that is not `known`."""
        sequence.num_published = len(known.blocks)
        contents = sequence.contents[sequence.num_published :]
        end = len(sequence.tokens)
        if self._enabled and (tail := self._part(sequence, end)) is not None:
            self._tails[sequence] = end, tail
            contents.append(tail)
        for content in contents:
            if content.digest not in self._in_progress:
                self._in_progress[content.digest] = sequence
                self._in_progress_index.add(content)

    def computed(self, sequence: Sequence, end: int) -> None:
        """Lets others find the first `end` tokens of a running sequence, which are computed."""
        # The tail first: a block that is full by now is known by all of its tokens.
        if self._tails and (tail := self._tails.get(sequence)) and end >= tail[0]:
            del self._tails[sequence]
            self._pool.publish(sequence.block_table[tail[0] // self._pool.block_size], tail[1])
            self._arrived(sequence, tail[1])
        full = end // self._pool.block_size
        if full > sequence.num_published and self._enabled:
            self._publish(sequence, full)

    def release(self, sequence: Sequence) -> None:
        """A running sequence gives up its blocks: others find what it has computed, and no more."""
        end = min(sequence.num_computed, sequence.num_known)
        # A step under way may have taken it past what is published, by blocks.
        is_next = end // self._pool.block_size == sequence.num_published
        if is_next and (part := self._part(sequence, end)):
            self._pool.publish(sequence.block_table[sequence.num_published], part)
        for content in sequence.contents[sequence.num_published :]:
            self._arrived(sequence, content)
        if tail := self._tails.pop(sequence, None):
            self._arrived(sequence, tail[1])

    def _publish(self, sequence: Sequence, full: int) -> None:
        """Lets others find a sequence's first `full` blocks, which are completely written."""
        self._extend_contents(sequence, full)
        for index in range(sequence.num_published, full):
            self._pool.publish(sequence.block_table[index], sequence.contents[index])
            self._arrived(sequence, sequence.contents[index])
        sequence.num_published = full

    def _extend_contents(self, sequence: Sequence, full: int) -> None:
        scope, size = sequence.request.cache_scope, self._pool.block_size
        extend_contents(sequence.contents, sequence.tokens, size, full, scope)

    def _part(self, sequence: Sequence, end: int) -> BlockContent | None:
        """What a sequence's first `end` tokens leave in a block that they do not fill."""
        full = end // self._pool.block_size
        if not self._enabled or not full or end % self._pool.block_size == 0:
            return None
        tokens = sequence.tokens[full * self._pool.block_size : end]
        return BlockContent.of(sequence.contents[full - 1].digest, tokens)

    def _arrived(self, sequence: Sequence, content: BlockContent) -> None:
        if self._in_progress.get(content.digest) is sequence:
            del self._in_progress[content.digest]
            self._in_progress_index.remove(content)
            self._wake(content.digest)


def _usable_tokens(sequence: Sequence) -> int:
    """The tokens that need not be computed: the logits and scores of a sequence need the rest."""
    # Logits at index i predict the token at position i + 1.
    unscored = sequence.unscored
    needed = unscored if unscored < len(sequence.request.prompt_ids) else len(sequence.tokens)
    return needed - 1
