from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_service.engine.drafting.ngram_drafter import NgramDrafter
from model_service.engine.kv_cache.block_pool import BlockPool
from model_service.engine.scheduling.prefill_budget import PrefillBudget
from model_service.engine.scheduling.schedule import Schedule
from model_service.engine.scheduling.scheduler import MAX_PARKED, Scheduler
from model_service.engine.scheduling.speculation.speculation import Speculation
from model_service.engine.sequence import GenerationRequest, Sequence

CONTEXT, BLOCK = 24, 4


def make_scheduler(blocks: int, max_batch_size: int = 4, max_step_tokens: int = 8) -> Scheduler:
    prefill_budget = PrefillBudget(2.0, BLOCK, max_step_tokens)
    return Scheduler(
        BlockPool(blocks, BLOCK),
        prefill_budget,
        Speculation(NgramDrafter(), prefill_budget, most=3),
        max_batch_size=max_batch_size,
        max_step_tokens=max_step_tokens,
        prefix_cache=True,
    )


def make_sequence(prompt: list[int], answer: int, arrival: int, priority: int = 0) -> Sequence:
    request = GenerationRequest(arrival, tuple(prompt), answer, priority=priority)
    return Sequence.from_request(request, CONTEXT, arrival)


def compute(scheduler: Scheduler, schedule: Schedule) -> list[Sequence]:
    """Applies a step to its sequences, with 7 as every token; returns those that ended."""
    ended = []
    for chunk in schedule.chunks:
        sequence = chunk.sequence
        if chunk.end == len(sequence.tokens):
            right = list(takewhile(lambda draft: draft == 7, chunk.drafts))
            sequence.tokens += [*right, 7]
            chunk.end += len(right)
            if not sequence.generates:
                ended.append(sequence)
    scheduler.advance(schedule.chunks)
    for sequence in ended:
        scheduler.remove(sequence)
    return ended


class Load(RuleBasedStateMachine):
    """Sequences with few different beginnings come, go and end; blocks are always short."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(CONTEXT // BLOCK + 2)
        self.pool = self.scheduler._pool
        self.alive: list[Sequence] = []
        self.arrivals = 0
        self.cache: dict[int, list[int]] = {}  # what was written to each block

    @rule(
        shared=st.integers(1, 16),
        own=st.lists(st.integers(7, 9), max_size=6),
        answer=st.integers(1, 8),
        priority=st.integers(0, 1),
    )
    def arrive(self, shared: int, own: list[int], answer: int, priority: int) -> None:
        prompt = [*range(100, 100 + shared), *own]
        sequence = make_sequence(prompt, answer, self.arrivals, priority)
        self.arrivals += 1
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.alive:
            index = data.draw(st.integers(0, len(self.alive) - 1))
            self.scheduler.remove(self.alive.pop(index))

    @rule(cancelled=st.integers(0, 20))
    def step(self, cancelled: int) -> None:
        schedule = self.scheduler.schedule()
        assert bool(schedule.chunks) == bool(self.alive)
        total = schedule.decode_rows + schedule.drafted_tokens + schedule.prompt_tokens
        assert sum(chunk.length for chunk in schedule.chunks) == total <= 8
        for chunk in schedule.chunks:
            assert chunk.end > chunk.begin
            computed = chunk.end + len(chunk.drafts)
            assert computed <= len(chunk.sequence.block_table) * BLOCK
            assert computed < chunk.sequence.limit or not chunk.drafts
        self.write(schedule)
        if cancelled < len(schedule.chunks):
            # While it is under way.
            chunk = schedule.chunks.pop(cancelled)
            chunk.sequence.num_computed = chunk.end
            self.scheduler.remove(chunk.sequence)
            self.alive.remove(chunk.sequence)
        for sequence in compute(self.scheduler, schedule):
            self.alive.remove(sequence)

    def write(self, schedule: Schedule) -> None:
        """Applies a step to the cache; all that a chunk builds on has to be there."""
        for source, destination in schedule.copies:
            self.cache[destination] = [*self.cache[source]]
        for chunk in schedule.chunks:
            tokens = chunk.sequence.tokens[: chunk.end] + chunk.drafts
            for position in range(chunk.begin, len(tokens)):
                block, place = chunk.sequence.block_table[position // BLOCK], position % BLOCK
                self.cache.setdefault(block, [0] * BLOCK)[place] = tokens[position]
        for chunk in schedule.chunks:
            table = chunk.sequence.block_table
            there = [token for block in table for token in self.cache.get(block, ())]
            assert there[: chunk.end] == chunk.sequence.tokens[: chunk.end]

    @invariant()
    def every_sequence_has_one_place(self) -> None:
        scheduler = self.scheduler
        held = {block for sequence in scheduler.running for block in sequence.block_table}
        assert self.pool.free_count + len(held) == self.pool.total
        assert scheduler.running_count + scheduler.waiting_count == len(self.alive)
        left = sum(sequence.limit - sequence.num_computed for sequence in self.alive)
        assert scheduler.outstanding_tokens == left

    @invariant()
    def what_is_known_of_a_block_stands_in_it(self) -> None:
        for block, content in self.pool._contents.items():
            tokens = memoryview(content.tokens).cast("i").tolist()
            assert self.cache[block][: len(tokens)] == tokens
            assert tokens

    @invariant()
    def whoever_waits_for_a_block_waits_for_a_running_sequence(self) -> None:
        for digest in self.scheduler._waiting._parked_at.values():
            assert self.scheduler._prefixes._in_progress[digest] in self.scheduler._running

    def teardown(self) -> None:
        for _ in range(40 * len(self.alive)):
            if self.alive:
                self.step(cancelled=20)
        assert not self.alive
        assert self.pool.free_count == self.pool.total
        assert not self.scheduler._prefixes._in_progress
        assert not self.scheduler._prefixes._tails
        assert not self.scheduler._prefixes._in_progress_index._by_parent


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_burst_with_one_beginning_is_looked_at_over_several_steps() -> None:
    scheduler = make_scheduler(blocks=100, max_batch_size=400, max_step_tokens=64)
    for arrival in range(3 * MAX_PARKED):
        scheduler.add(make_sequence([7] * 20, 2, arrival))
    scheduler.schedule()
    assert len(scheduler._waiting._parked_at) == MAX_PARKED
    left = 3 * MAX_PARKED
    while left:
        left -= len(compute(scheduler, scheduler.schedule()))
    assert scheduler.cached_prompt_tokens >= (3 * MAX_PARKED - 1) * 16
