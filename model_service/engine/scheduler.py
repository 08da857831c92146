"""Decides which tokens the next step computes.

Running sequences come first, one token each, then chunks of prompts, up to a token budget: a long
prompt never stalls running streams for longer than one chunk. A sequence gets the blocks of its
whole prompt when it is admitted and one more whenever decode fills the last; when none is left, the
youngest running sequence gives up its blocks and is computed again later, from prompt and answer.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from model_service.engine.block_pool import BlockPool
from model_service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes: the next `length` after `num_computed`."""

    sequence: Sequence
    length: int

    @property
    def end(self) -> int:
        """Tokens of the sequence in the cache after the step."""
        return self.sequence.num_computed + self.length


class Scheduler:
    """Owns the queue of waiting sequences, the running ones, and their blocks."""

    def __init__(self, pool: BlockPool, max_batch_size: int, max_step_tokens: int) -> None:
        self._pool = pool
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._waiting: list[tuple[int, int, Sequence]] = []  # heap: priority, arrival, sequence
        self._running: list[Sequence] = []  # in order of admission
        self.preemptions = 0

    @property
    def running(self) -> Iterable[Sequence]:
        return self._running

    @property
    def waiting(self) -> Iterable[Sequence]:
        return (sequence for _, _, sequence in self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (-sequence.request.priority, sequence.arrival, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; its blocks are free at once."""
        if sequence.block_table:
            self._running.remove(sequence)
            self._release(sequence)
            return
        self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
        heapq.heapify(self._waiting)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, their blocks allocated; empty when there is nothing to do."""
        budget = self._max_step_tokens
        chunks = []
        # Decode first, then prompts under way; sorting is stable: each in order of admission.
        for sequence in sorted(self._running, key=lambda s: s.num_uncomputed > 1):
            if budget == 0:
                break
            # Without blocks it is no longer running: an earlier turn of this loop preempted it.
            if sequence.block_table and self._grow(sequence):
                chunks.append(Chunk(sequence, min(budget, sequence.num_uncomputed)))
                budget -= chunks[-1].length
        # A sequence that was preempted after its turn has no blocks to write to.
        chunks = [chunk for chunk in chunks if chunk.sequence.block_table]
        while budget > 0 and (admitted := self._admit()) is not None:
            chunks.append(Chunk(admitted, min(budget, admitted.num_uncomputed)))
            budget -= chunks[-1].length
        return chunks

    def _admit(self) -> Sequence | None:
        """Lets the next waiting sequence run, if there is a place and blocks for it."""
        if not self._waiting or len(self._running) >= self._max_batch_size:
            return None
        sequence = self._waiting[0][2]
        wanted = self._pool.blocks_for(len(sequence.tokens))
        if wanted > self._pool.free_count:
            return None
        heapq.heappop(self._waiting)
        sequence.block_table = self._pool.allocate(wanted)
        self._running.append(sequence)
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for all tokens of a running sequence; False when it had to give way itself."""
        missing = self._pool.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        while missing > self._pool.free_count:
            victim = max(self._running, key=lambda s: (-s.request.priority, s.arrival))
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(max(0, missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
