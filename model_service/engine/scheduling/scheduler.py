"""Decides which tokens the next step computes.

Running sequences come first, one token each, then chunks of prompts, up to the prefill budget: so a
long prompt never stalls running streams for longer than allowed. A sequence gets the blocks of its
whole prompt when it is admitted and one more whenever decode fills the last. When none is left, the
youngest running sequence is preempted: it gives up its blocks and is computed again later, from
prompt and answer. Cached blocks of a sequence's prefix are shared; if another sequence is computing
that prefix right now, the sequence waits for it instead of computing it twice.
"""

from collections.abc import Iterable

from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.kv_cache.prefix_cache import CachedPrefix, PrefixCache
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.schedule import Chunk, Schedule
from model_service.engine.scheduling.speculation.speculation import Speculation
from model_service.engine.scheduling.waiting import WaitingQueue
from model_service.engine.sequence import Sequence, Status
from model_service.model.attention.backend import BlockCopy

# Sequences parked per step: a burst of arrivals with one prefix is handled over several steps, so
# that streams run meanwhile.
MAX_PARKED = 64


class Scheduler:
    """Owns the queue of waiting sequences, the running ones, and their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        prefill_budget: PrefillBudget,
        speculation: Speculation,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        prefix_cache: bool,
    ) -> None:
        self._pool = pool
        self._prefill_budget = prefill_budget
        self._speculation = speculation
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._waiting = WaitingQueue()
        self._prefixes = PrefixCache(pool, self._waiting.wake, enabled=prefix_cache)
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._copies: list[BlockCopy] = []  # that the next step has to make
        self.preemptions = 0
        self.cached_prompt_tokens = 0  # found in the cache at admissions

    @property
    def running(self) -> Iterable[Sequence]:
        return self._running

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that may still be computed; what the cache will save is not known before."""
        return self._waiting.tokens + sum([s.limit - s.num_computed for s in self._running])

    def add(self, sequence: Sequence) -> None:
        self._waiting.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, waiting or running; its blocks are free at once."""
        self._speculation.forget(sequence)
        if sequence.is_running:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.ENDED

    def invalidate(self, sequence: Sequence) -> None:
        """Keeps the keys and values of a running sequence from being used again."""
        self._pool.invalidate(sequence.block_table)
        sequence.num_computed = 0

    @property
    def must_preempt(self) -> bool:
        """Whether the next step needs more blocks than are free."""
        return sum(map(self._missing, self._growing())) > self._pool.free_count

    def schedule(self) -> Schedule:
        """The next step; without chunks if there is nothing to do.

        Another step may be in flight, unless the scheduler `must_preempt`: the tokens of a
        preempted sequence have to be cached.
        """
        # First, because a sequence that needs a block may preempt any other.
        for sequence in self._growing():
            self._grow(sequence)
        decode, prompts = [], []
        for sequence in self._running:
            if sequence.status is Status.LAST_STEP:
                continue
            length = len(sequence.tokens)
            if length - sequence.num_computed == 1:
                decode.append(Chunk(sequence, length - 1, length))
            else:
                prompts.append(sequence)
        del decode[self._max_step_tokens :]
        rows = len(decode)
        admits = bool(self._waiting) and len(self._running) < self._max_batch_size
        drafted = self._draft(decode, busy=admits or bool(prompts))
        room = self._max_step_tokens - rows
        budget = max(0, min(room, self._prefill_budget.prompt_budget(rows)) - drafted)
        chunks, left = decode, budget
        for sequence in prompts:
            if left:
                left -= self._append_chunk(sequence, left, chunks)
        left = self._admit(left, chunks)
        copies, self._copies = self._copies, []
        return Schedule(chunks, rows, drafted, budget - left, copies, self._speculation.seconds)

    def _draft(self, decode: list[Chunk], *, busy: bool) -> int:
        """Adds guesses to decoding chunks where they are worth it; returns how many."""
        # The step makes one token more than there are guesses, and none for a prompt that fills
        # the context.
        rooms = {each.sequence: max(0, each.sequence.limit - each.end - 1) for each in decode}
        proposed = self._speculation.propose(rooms, busy=busy)
        drafted, spare, size = 0, self._max_step_tokens - len(decode), self._pool.block_size
        for chunk in decode:
            sequence, drafts = chunk.sequence, proposed.get(chunk.sequence, [])[: spare - drafted]
            if not drafts:
                continue
            missing = self._pool.blocks_for(chunk.end + len(drafts)) - len(sequence.block_table)
            if missing > 0:
                sequence.block_table += self._pool.allocate(min(missing, self._pool.free_count))
            chunk.drafts = drafts[: len(sequence.block_table) * size - chunk.end]
            drafted += len(chunk.drafts)
        return drafted

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Records that the chunks' keys and values are in the cache, where others find them."""
        for chunk in chunks:
            sequence = chunk.sequence
            # The step in flight may have taken it further.
            sequence.num_computed = max(sequence.num_computed, chunk.end)
            self._prefixes.computed(sequence, chunk.end)

    @staticmethod
    def _append_chunk(sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Appends the sequence's next chunk of at most `budget` tokens; returns its length."""
        begin = sequence.num_computed
        end = min(begin + budget, len(sequence.tokens))
        chunks.append(Chunk(sequence, begin, end))
        return end - begin

    def _admit(self, budget: int, chunks: list[Chunk]) -> int:
        """Admits waiting sequences while batch and cache have room; returns the budget left."""
        parked = 0
        while budget and parked < MAX_PARKED and len(self._running) < self._max_batch_size:
            sequence = self._waiting.first()
            if sequence is None:
                break
            cached = self._prefixes.find(sequence)
            if cached.waits_for is not None:
                self._waiting.park(sequence, cached.waits_for)
                parked += 1
                continue
            wanted = self._pool.blocks_for(len(sequence.tokens)) - len(cached.blocks)
            if wanted > self._pool.free_besides(cached.blocks):
                break
            self._waiting.remove(sequence)
            self._start(sequence, cached, wanted)
            budget -= self._append_chunk(sequence, budget, chunks)
        return budget

    def _start(self, sequence: Sequence, cached: CachedPrefix, wanted: int) -> None:
        self._pool.share(cached.blocks)
        own = self._pool.allocate(wanted)
        sequence.block_table = cached.blocks + own
        if cached.copied is not None:
            self._copies.append(BlockCopy(cached.copied, own[0]))
        sequence.num_computed = cached.tokens
        if sequence.cached_at_start is None:
            sequence.cached_at_start = sequence.num_computed
        self.cached_prompt_tokens += min(sequence.num_computed, len(sequence.request.prompt_ids))
        self._running[sequence] = None
        sequence.status = Status.RUNNING
        self._prefixes.start(sequence, cached)

    def _growing(self) -> list[Sequence]:
        """Running sequences that need another block for their next token."""
        size = self._pool.block_size
        return [
            sequence
            for sequence in self._running
            if len(sequence.tokens) > len(sequence.block_table) * size
            and sequence.status is not Status.LAST_STEP
        ]

    def _missing(self, sequence: Sequence) -> int:
        return self._pool.blocks_for(len(sequence.tokens)) - len(sequence.block_table)

    def _grow(self, sequence: Sequence) -> None:
        """Gives a running sequence blocks for all of its tokens, or preempts it."""
        if not sequence.is_running:  # an earlier sequence of this step preempted it
            return
        missing = self._missing(sequence)
        while missing > self._pool.free_count:
            victim = max(self._running, key=lambda s: (-s.request.priority, s.arrival))
            self._preempt(victim)
            if victim is sequence:
                return
        sequence.block_table += self._pool.allocate(missing)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.status = Status.WAITING
        self._waiting.push(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._prefixes.release(sequence)
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        sequence.num_published = 0
