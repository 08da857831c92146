"""The bookkeeping of the draft model's cache, against a cache that holds what was written to it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_service.engine.drafting.draft_cache import DraftCache
from model_service.engine.sequence import GenerationRequest, Sequence, Status

BLOCK, BLOCKS, CONTEXT = 4, 12, 40


class Drafting(RuleBasedStateMachine):
    """Sequences that begin alike come, get tokens that were guessed or not, pause, and end."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = DraftCache(BLOCKS, BLOCK, prefix_cache=True)
        # By block and place: the scope and the text up to the token there.
        self.written: dict[tuple[int, int], tuple[str, list[int]]] = {}
        self.alive: list[Sequence] = []
        self.arrivals = 0

    @rule(
        scope=st.sampled_from(["", "other"]),
        shared=st.integers(1, 14),
        own=st.lists(st.integers(0, 1), max_size=6),
    )
    def arrive(self, scope: str, shared: int, own: list[int]) -> None:
        prompt = (*range(100, 100 + shared), *own)
        request = GenerationRequest(self.arrivals, prompt, CONTEXT, cache_scope=scope)
        sequence = Sequence.from_request(request, CONTEXT, self.arrivals)
        sequence.status = Status.RUNNING
        self.arrivals += 1
        self.alive.append(sequence)

    @rule(
        data=st.data(),
        guesses=st.lists(st.integers(0, 1), max_size=4),
        most=st.integers(1, 20),
    )
    def draft(self, data: st.DataObject, guesses: list[int], most: int) -> None:
        """Computes a part of the backlog, and guesses behind it if that is all."""
        if not self.alive:
            return
        sequence = data.draw(st.sampled_from(self.alive))
        begin, length = self.cache.begin(sequence), len(sequence.tokens)
        assert begin < length
        end = min(length, begin + most)
        if not self.cache.reserve(sequence, end + len(guesses)):
            return
        self.write(sequence, sequence.tokens[:end], begin)
        self.cache.record(sequence, sequence.tokens[begin:end], end)
        if end == length:
            for number, guess in enumerate(guesses):
                text = [*sequence.tokens, *guesses[: number + 1]]
                self.write(sequence, text, len(text) - 1)
                self.cache.record(sequence, [guess], len(text))

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        if self.alive:
            sequence = data.draw(st.sampled_from(self.alive))
            sequence.tokens += tokens[: CONTEXT - len(sequence.tokens)]

    @rule(data=st.data(), status=st.sampled_from([Status.RUNNING, Status.WAITING]))
    def pause(self, data: st.DataObject, status: Status) -> None:
        if self.alive:
            data.draw(st.sampled_from(self.alive)).status = status

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.alive:
            sequence = data.draw(st.sampled_from(self.alive))
            self.alive.remove(sequence)
            self.cache.release(sequence)

    def write(self, sequence: Sequence, text: list[int], begin: int) -> None:
        """Writes the tokens of `text` from `begin` on, where all before them must be right."""
        table = self.cache.table(sequence)
        for position in range(len(text)):
            place = table[position // BLOCK], position % BLOCK
            known = sequence.request.cache_scope, text[: position + 1]
            if position >= begin:
                self.written[place] = known
            assert self.written[place] == known

    @invariant()
    def every_sequence_finds_its_own_tokens(self) -> None:
        for sequence, state in self.cache._computed.items():
            for position in range(state.end):
                known = sequence.request.cache_scope, sequence.tokens[: position + 1]
                assert self.written[state.table[position // BLOCK], position % BLOCK] == known

    @invariant()
    def blocks_are_held_by_sequences_that_are_alive(self) -> None:
        held = {block for state in self.cache._computed.values() for block in state.table}
        assert self.cache.pool.free_count == BLOCKS - len(held)
        assert self.cache._computed.keys() <= {*self.alive}


Drafting.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestDrafting = Drafting.TestCase
