"""Which tokens of which sequences the draft model has computed, and in which blocks of its cache.

A sequence's tokens only ever grow, so what was computed of them stays right whatever becomes of the
sequence in the target's cache. Guesses are computed ahead of them, and count only once the sequence
has got the same tokens. Full blocks are known by their content, as in the target's cache: another
sequence that begins alike takes them over.
"""

from dataclasses import dataclass, field

from model_service.engine.block_content import BlockContent, extend_contents
from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.sequence import Sequence


@dataclass(slots=True)
class _Computed:
    """The state of one sequence."""

    table: list[int]
    end: int  # tokens of the sequence that are computed
    guesses: list[int] = field(default_factory=list)  # computed behind those
    contents: list[BlockContent] = field(default_factory=list)
    published: int = 0  # full blocks that others can find


class DraftCache:
    """The blocks of the draft model's cache."""

    def __init__(self, blocks: int, block_size: int, *, prefix_cache: bool) -> None:
        """Starts empty.

        Args:
            blocks: in the cache, beside the probe block.
            block_size: tokens per block.
            prefix_cache: whether a sequence takes over what others have computed.
        """
        self.pool = BlockPool(blocks, block_size)
        self._prefix_cache = prefix_cache
        self._computed: dict[Sequence, _Computed] = {}

    def begin(self, sequence: Sequence) -> int:
        """The index of the first token that is not computed; at most that of the last token.

        The last token is computed again if need be, because its logits are wanted.
        """
        state = self._computed.get(sequence)
        if state is None:
            return self._take_over(sequence)
        following = sequence.tokens[state.end : len(sequence.tokens) - 1]
        for guess, token in zip(state.guesses, following, strict=False):
            if guess != token:
                break
            state.end += 1
        state.guesses = []
        state.end = min(state.end, len(sequence.tokens) - 1)
        self._publish(sequence, state)
        return state.end

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Gives the sequence blocks for `length` tokens; False if too few are free.

        Sequences that do not run give theirs back first.
        """
        table = self._computed[sequence].table
        missing = self.pool.blocks_for(length) - len(table)
        if missing > self.pool.free_count:
            for idle in [each for each in self._computed if not each.is_running]:
                self.release(idle)
        if missing > self.pool.free_count:
            return False
        if missing > 0:
            table += self.pool.allocate(missing)
        return True

    def table(self, sequence: Sequence) -> list[int]:
        """The blocks of a sequence that has some reserved."""
        return self._computed[sequence].table

    def record(self, sequence: Sequence, tokens: list[int], end: int) -> None:
        """Records tokens that were computed, the last one at index `end` - 1.

        They are the sequence's own, or guesses behind its last one.
        """
        state = self._computed[sequence]
        if end > len(sequence.tokens):
            state.guesses += tokens
        else:
            state.end = end

    def release(self, sequence: Sequence) -> None:
        """Gives the sequence's blocks back; others can still find what was computed in them."""
        if sequence in self._computed:
            self.begin(sequence)
            self.pool.free(self._computed.pop(sequence).table)

    def _take_over(self, sequence: Sequence) -> int:
        state = self._computed[sequence] = _Computed([], 0)
        size = self.pool.block_size
        if self._prefix_cache:
            self._extend_contents(sequence, state, (len(sequence.tokens) - 1) // size)
            state.table = self.pool.match(content.digest for content in state.contents)
            self.pool.share(state.table)
            state.published = len(state.table)
            state.end = state.published * size
        return state.end

    def _publish(self, sequence: Sequence, state: _Computed) -> None:
        full = state.end // self.pool.block_size
        if not self._prefix_cache or full <= state.published:
            return
        self._extend_contents(sequence, state, full)
        for index in range(state.published, full):
            self.pool.publish(state.table[index], state.contents[index])
        state.published = full

    def _extend_contents(self, sequence: Sequence, state: _Computed, full: int) -> None:
        scope, size = sequence.request.cache_scope, self.pool.block_size
        extend_contents(state.contents, sequence.tokens, size, full, scope)
