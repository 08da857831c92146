"""Which ended streams are forgotten when all callers together keep too many bytes."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.rpc.ended_streams import EndedStreams, StreamKey

MAX_BYTES = 100
CALLERS = ("a", "b", "c")


def test_caller_that_keeps_the_most_loses_its_oldest_stream() -> None:
    ended = EndedStreams(MAX_BYTES)
    for key in [("a", "1"), ("b", "1"), ("a", "2"), ("a", "3")]:
        assert ended.add(key, 25) == []
    assert ended.add(("b", "2"), 25) == [("a", "1")]
    assert ended.add(("c", "1"), 25) == [("a", "2")]


def test_stream_that_does_not_fit_at_all_is_forgotten_at_once() -> None:
    ended = EndedStreams(MAX_BYTES)
    ended.add(("a", "1"), 50)
    assert ended.add(("b", "1"), MAX_BYTES + 1) == [("b", "1")]


class Pool(RuleBasedStateMachine):
    """Streams end and are forgotten; no caller within an equal share loses one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = EndedStreams(MAX_BYTES)
        self.kept: dict[StreamKey, int] = {}  # in the order of their ends
        self.number = 0

    def kept_by(self, caller: str) -> int:
        return sum(size for key, size in self.kept.items() if key[0] == caller)

    @rule(caller=st.sampled_from(CALLERS), size=st.integers(0, 40))
    def end(self, caller: str, size: int) -> None:
        self.number += 1
        key = (caller, str(self.number))
        self.kept[key] = size
        for lost in self.ended.add(key, size):
            assert sum(self.kept.values()) > MAX_BYTES
            callers = {each for each, _ in self.kept}
            assert self.kept_by(lost[0]) > MAX_BYTES / len(callers)
            assert lost == next(key for key in self.kept if key[0] == lost[0])
            del self.kept[lost]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.kept]))
        self.ended.remove(key)
        del self.kept[key]

    @invariant()
    def keeps_no_more_than_the_bound(self) -> None:
        assert sum(self.kept.values()) <= MAX_BYTES


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30)
