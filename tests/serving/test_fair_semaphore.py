"""Turns for work of known cost: what runs at once is bounded, and callers share it."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.intake.fair_semaphore import FairSemaphore

WORK = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 150)), min_size=1, max_size=40)


async def settle() -> None:
    """Lets every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Work that ends when the test says so, in the order in which it began."""

    def __init__(self, turns: FairSemaphore) -> None:
        self.turns = turns
        self.running: list[tuple[int, asyncio.Event]] = []
        self.begun: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, caller: str, cost: int, weight: float = 1.0) -> asyncio.Task[None]:
        async def work() -> None:
            async with self.turns.acquire(caller, cost, weight):
                ended = asyncio.Event()
                self.begun.append(caller)
                self.running.append((cost, ended))
                try:
                    await ended.wait()
                finally:
                    self.running.remove((cost, ended))

        self.tasks.append(asyncio.create_task(work()))
        return self.tasks[-1]

    async def end_one(self) -> None:
        self.running[0][1].set()
        await settle()


@given(work=WORK, cancelled=st.sets(st.integers(0, 39)))
async def test_what_runs_is_within_the_capacity_or_alone_and_all_gets_its_turn(
    work: list[tuple[str, int]], cancelled: set[int]
) -> None:
    line = Line(FairSemaphore(capacity=100))
    tasks = [line.add(caller, cost) for caller, cost in work]
    await settle()
    for index in cancelled & set(range(1, len(tasks))):
        tasks[index].cancel()
    await settle()
    while line.running:
        costs = [cost for cost, _ in line.running]
        assert sum(costs) <= 100 or len(costs) == 1
        await line.end_one()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(each is None or isinstance(each, asyncio.CancelledError) for each in done)
    assert line.turns.running == 0


async def test_caller_with_little_work_does_not_wait_for_one_with_much() -> None:
    line = Line(FairSemaphore(capacity=1))
    for _ in range(20):
        line.add("much", 100)
    line.add("little", 1)
    await settle()
    await line.end_one()
    await line.end_one()
    assert "little" in line.begun
    for task in line.tasks:
        task.cancel()


@pytest.mark.parametrize("weight", [1, 3])
async def test_callers_share_by_weight(weight: int) -> None:
    line = Line(FairSemaphore(capacity=1))
    for _ in range(100):
        line.add("one", 1)
        line.add("other", 1, weight)
    await settle()
    for _ in range(60):
        await line.end_one()
    shares = Counter(line.begun)
    assert shares["other"] == pytest.approx(weight * shares["one"], abs=weight + 1)
    for task in line.tasks:
        task.cancel()


async def test_idle_caller_keeps_no_credit() -> None:
    line = Line(FairSemaphore(capacity=1))
    for _ in range(40):
        line.add("busy", 1)
    await settle()
    for _ in range(20):
        await line.end_one()
    for _ in range(10):
        line.add("late", 1)
    await settle()
    before = len(line.begun)
    for _ in range(10):
        await line.end_one()
    assert Counter(line.begun[before:])["busy"] >= 4
    for task in line.tasks:
        task.cancel()


async def test_given_up_work_does_not_pile_up_behind_work_that_lasts() -> None:
    line = Line(FairSemaphore(capacity=1))
    line.add("lasts", 1)
    given_up = [line.add("impatient", 1) for _ in range(100)]
    line.add("waits", 1)
    await settle()
    for task in given_up:
        task.cancel()
    await settle()
    assert len(line.turns._waiting) < 10
    await line.end_one()
    assert line.begun == ["lasts", "waits"]
    await line.end_one()
