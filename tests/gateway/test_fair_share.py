"""The requests that a new one displaces from a full queue, as arithmetic."""

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission.fair_share import Holding, SharedRoom

BOUND = 20
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 0.5, "d": 3.0}

keys = st.sampled_from([*WEIGHTS])
amounts = st.integers(1, BOUND + 2)
priorities = st.integers(-2, 2)


def holding(key: str, priority: int = 0) -> Holding:
    return Holding(key, WEIGHTS[key], priority)


def filled(key: str, *sizes: int) -> tuple[SharedRoom, list[Holding]]:
    """A room in which one key's requests wait."""
    room, held = SharedRoom(BOUND), [holding(key) for _ in sizes]
    for each, size in zip(held, sizes, strict=True):
        room.reserve(each, size)
    return room, held


def test_newest_request_of_the_largest_key_gives_way() -> None:
    room, [_, newest] = filled("a", 15, 5)
    assert room.displaced_by(holding("b"), 3) == [newest]


def test_lowest_priority_gives_way_before_newer_requests() -> None:
    room, _ = filled("a", 5)
    low = holding("a", priority=-1)
    room.reserve(low, 5)
    room.reserve(holding("a"), 10)
    assert room.displaced_by(holding("b"), 3) == [low]


def test_request_that_takes_its_key_above_its_share_is_refused() -> None:
    room, _ = filled("a", 1, 1, 18)
    assert room.displaced_by(holding("b"), BOUND // 2) is not None
    assert room.displaced_by(holding("b"), BOUND // 2 + 1) is None


def test_shares_go_by_weight() -> None:
    room, _ = filled("a", 10, 10)
    assert room.displaced_by(holding("d"), 15) is not None
    assert room.displaced_by(holding("d"), 16) is None


def test_request_that_has_begun_stays_and_keeps_nobody_out() -> None:
    room, [begun] = filled("a", BOUND)
    begun.begun = True
    assert room.displaced_by(holding("b"), 10) == []
    assert room.displaced_by(holding("a"), 1) is None


def test_higher_priority_is_not_displaced_by_lower() -> None:
    room, _ = filled("a", BOUND)
    assert room.displaced_by(holding("b", priority=-1), 1) is None
    assert room.displaced_by(holding("b"), 1) is not None


@given(st.lists(amounts, max_size=8), amounts)
def test_one_key_alone_is_refused_at_the_bound_and_displaces_nothing(
    sizes: list[int], amount: int
) -> None:
    room, _ = filled("a", *sizes)
    displaced = room.displaced_by(holding("a"), amount)
    assert displaced == ([] if sum(sizes) + amount <= BOUND else None)


class Door(RuleBasedStateMachine):
    """Requests come, begin and end, and what is displaced has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.room = SharedRoom(BOUND)
        self.held: list[tuple[Holding, int]] = []

    def waiting(self) -> dict[str, int]:
        """The room of requests that have not begun, by key."""
        waiting = dict.fromkeys(WEIGHTS, 0)
        for each, amount in self.held:
            waiting[each.key] += 0 if each.begun else amount
        return waiting

    @rule(key=keys, priority=priorities, amount=amounts)
    def come(self, key: str, priority: int, amount: int) -> None:
        newcomer = holding(key, priority)
        shares = self.room.shares(key, WEIGHTS[key])
        assert shares is not None
        displaced = self.room.displaced_by(newcomer, amount)
        if displaced is None:
            self.is_rightly_refused(newcomer, amount, shares)
            return
        for each in displaced:
            self.may_be_displaced(each, newcomer, amount, shares)
            self.held.remove((each, self.room.amount(each)))
            self.room.release(each)
        if displaced:
            assert self.room.used_by(key) + amount <= shares[key]
        self.room.reserve(newcomer, amount)
        self.held.append((newcomer, amount))

    def is_rightly_refused(
        self, newcomer: Holding, amount: int, shares: Mapping[str, float]
    ) -> None:
        """A key within its share is refused only because of higher priorities that wait."""
        assert self.room.used + amount > BOUND
        above = [each for each, _ in self.held if each.priority > newcomer.priority]
        within = self.room.used_by(newcomer.key) + amount <= shares[newcomer.key]
        assert not within or any(each.key != newcomer.key and not each.begun for each in above)

    def may_be_displaced(
        self, each: Holding, newcomer: Holding, amount: int, shares: Mapping[str, float]
    ) -> None:
        assert not each.begun
        assert each.priority <= newcomer.priority
        waiting = self.waiting()
        assert waiting[each.key] > shares[each.key]
        others = sum(waiting.values()) - waiting[newcomer.key]
        still_too_much = self.room.used_by(newcomer.key) + amount + others > BOUND
        assert still_too_much

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.held))[0].begun = True

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        over = data.draw(st.sampled_from(self.held))
        self.held.remove(over)
        self.room.release(over[0])

    @invariant()
    def counts_what_is_held(self) -> None:
        assert self.room.used == sum(amount for _, amount in self.held)
        for key in WEIGHTS:
            held = sum(amount for each, amount in self.held if each.key == key)
            assert self.room.used_by(key) == held

    @invariant()
    def no_more_waits_than_the_bound(self) -> None:
        assert sum(self.waiting().values()) <= BOUND


TestDoor = Door.TestCase
TestDoor.settings = settings(max_examples=60, stateful_step_count=30)
