"""Fairness as arithmetic: keys compete for a server that makes one token per running claim and
step. The bounds are those of Sheng et al., "Fairness in Serving Large Language Models".
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission.fair_queue import Claim, FairQueue

LARGEST = 20  # tokens of a claim
KEYS = ("a", "b", "c")

sizes = st.integers(1, LARGEST)
lists = st.lists(sizes, min_size=1, max_size=10)
places = st.integers(1, 8)
weights = st.fixed_dictionaries({key: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for key in KEYS})


def claim(key: str, tokens: int = 1, weight: float = 1.0, priority: int = 0) -> Claim:
    return Claim(key, weight, priority, tokens)


def serve(queue: FairQueue, places: int) -> Iterator[str]:
    """The keys of the tokens that are made until none waits, in order."""
    running: dict[Claim, int] = {}
    while len(queue):
        while len(queue) and len(running) < places:
            taken = queue.pop()
            running[taken] = taken.tokens
        for each in [*running]:
            queue.charge(each, 1)
            yield each.key
            running[each] -= 1
            if not running[each]:
                del running[each]
                queue.end(each)
    for each in running:
        queue.end(each)


def fill(queue: FairQueue, key: str, weight: float, claims: int, tokens: list[int]) -> None:
    for size in itertools.islice(itertools.cycle(tokens), claims):
        queue.push(claim(key, size, weight))


@given(weights, st.fixed_dictionaries(dict.fromkeys(KEYS, lists)), places)
def test_keys_that_all_wait_are_served_by_their_weights(
    shares: Mapping[str, float], tokens: Mapping[str, list[int]], places: int
) -> None:
    queue = FairQueue()
    for key in KEYS:
        fill(queue, key, shares[key], 40, tokens[key])
    served: Counter[str] = Counter()
    # The generations that run at once may be another key's; nothing else may set them apart.
    apart = 2 * places * LARGEST / min(shares.values())
    for key in serve(queue, places):
        served[key] += 1
        if {*queue.waiting_tokens} != {*KEYS}:
            break
        virtual = [served[key] / shares[key] for key in KEYS]
        assert max(virtual) - min(virtual) <= apart


@given(places, lists, st.integers(1, 200))
def test_one_claim_is_not_starved_by_a_thousand(
    places: int, tokens: list[int], patience: int
) -> None:
    queue = FairQueue()
    fill(queue, "many", 1, 1000, tokens)
    served = serve(queue, places)
    for _ in range(patience):
        next(served)
    queue.push(claim("one"))
    # All that runs may have to end, and each place be taken once by a key that is as far behind.
    assert "one" in itertools.islice(served, 3 * places * LARGEST)


@given(places, lists, st.integers(1, 10))
def test_a_key_that_comes_back_has_no_credit_for_its_absence(
    places: int, tokens: list[int], absence: int
) -> None:
    queue = FairQueue()
    fill(queue, "back", 1, 1, tokens)
    fill(queue, "stayed", 1, 1000, tokens)
    served = serve(queue, places)
    for _ in range(absence * LARGEST):
        next(served)
    fill(queue, "back", 1, 1000, tokens)
    since = Counter(itertools.islice(served, 800))
    assert since["back"] - since["stayed"] <= 2 * places * LARGEST


@given(st.lists(st.tuples(st.sampled_from(KEYS), sizes, st.integers(-3, 3)), min_size=1))
def test_higher_priority_goes_first_whoever_asks(asked: list[tuple[str, int, int]]) -> None:
    queue = FairQueue()
    for key, tokens, priority in asked:
        queue.push(claim(key, tokens, priority=priority))
    taken = [queue.pop() for _ in asked]
    assert [each.priority for each in taken] == sorted(
        (priority for _, _, priority in asked), reverse=True
    )


@given(weights, st.lists(st.tuples(st.sampled_from(KEYS), sizes), max_size=60), sizes)
def test_tokens_ahead_are_those_served_before_the_turn(
    shares: Mapping[str, float], asked: list[tuple[str, int]], tokens: int
) -> None:
    queue = FairQueue()
    for key, size in asked:
        queue.push(claim(key, size, shares[key]))
    expected = queue.tokens_ahead("a", shares["a"], 0)
    queue.push(last := claim("a", tokens, shares["a"]))
    ahead = 0
    while (taken := queue.pop()) is not last:
        queue.charge(taken, taken.tokens)
        ahead += taken.tokens
    # Claims are served whole: each other key may be one claim further.
    assert -1e-6 <= ahead - expected <= 2 * LARGEST


class Bookkeeping(RuleBasedStateMachine):
    """Whatever is asked for is taken once, or withdrawn; what is idle is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.waiting: list[Claim] = []
        self.taken: list[Claim] = []

    @rule(key=st.sampled_from(KEYS), tokens=sizes, priority=st.integers(-1, 1))
    def ask(self, key: str, tokens: int, priority: int) -> None:
        self.waiting.append(claim(key, tokens, priority=priority))
        self.queue.push(self.waiting[-1])

    @precondition(lambda self: self.waiting)
    @rule()
    def serve_next(self) -> None:
        self.taken.append(self.queue.pop())
        self.waiting.remove(self.taken[-1])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(gone)
        self.waiting.remove(gone)

    @precondition(lambda self: self.taken)
    @rule(tokens=st.integers(-LARGEST, LARGEST))
    def charge_and_end(self, tokens: int) -> None:
        over = self.taken.pop()
        self.queue.charge(over, tokens)
        self.queue.end(over)

    @invariant()
    def knows_who_waits(self) -> None:
        tokens: Counter[str] = Counter()
        for each in self.waiting:
            tokens[each.key] += each.tokens
        assert len(self.queue) == len(self.waiting)
        assert self.queue.waiting_tokens == tokens
        if not self.waiting and not self.taken:
            assert self.queue.tokens_ahead("a", 1, 0) == 0


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=40, stateful_step_count=30)
