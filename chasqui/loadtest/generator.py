"""Sends the requests of a run, in a closed or an open loop, and measures them.

An open loop does not wait for answers, and its latencies count from the time at which a request was
*meant* to be sent. So neither a slow server nor a late generator reduces the load or improves the
numbers (Gil Tene's "coordinated omission").
"""

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from random import Random

from chasqui.loadtest.records import Failure, Record, Run
from chasqui.loadtest.sender import Sender, clock
from chasqui.loadtest.workload import Work


@dataclass(frozen=True, slots=True)
class Closed:
    """A fixed number of requests in progress: the next one is sent when one has ended."""

    concurrency: int

    def __str__(self) -> str:
        return f"{self.concurrency} at a time"


@dataclass(frozen=True, slots=True)
class Open:
    """Requests arrive as a Poisson process of `rate` per second, independent of the answers."""

    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.rate:g} per second"


@dataclass(frozen=True, slots=True)
class Until:
    """The bounds after which no more requests are sent; None: no such bound."""

    requests: int | None = None
    seconds: float | None = None


class _Phase:
    """The requests of a run in progress."""

    def __init__(self, sender: Sender) -> None:
        self.origin = clock()
        self.records: list[Record] = []
        self.unfinished = 0
        self._sender = sender

    async def send(self, work: Work, intended: float) -> Record:
        self.unfinished += 1
        record = await self._sender.send(work, intended, self.origin)
        self.unfinished -= 1
        self.records.append(record)
        return record


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """The endless arrival times of a Poisson process, in seconds after its start."""
    random = Random(f"{seed} arrivals")
    now = 0.0
    while True:
        now += random.expovariate(rate)
        yield now


async def run(sender: Sender, work: Iterator[Work], loop: Closed | Open, until: Until) -> Run:
    """Sends work until the first bound is reached, and waits until all answers have ended.

    SIGINT or SIGTERM ends it early: the Run is `interrupted` and has the records so far. A second
    signal has its usual effect.
    """
    started, cpu = datetime.now(UTC), time.process_time()
    phase = _Phase(sender)
    bounded = islice(work, until.requests)
    match loop:
        case Closed(concurrency):
            sending = _closed(phase, bounded, concurrency, until)
        case Open(rate, seed):
            sending = _open(phase, bounded, arrivals(rate, seed), until)
    interrupted = await _interrupted(sending)
    cpu_seconds = time.process_time() - cpu
    return Run(
        started=started,
        records=tuple(sorted(phase.records, key=lambda record: record.index)),
        seconds=max((record.ended for record in phase.records), default=0.0),
        cpu_seconds=cpu_seconds,
        cpu_share=cpu_seconds / (clock() - phase.origin),
        interrupted=interrupted,
        unfinished=phase.unfinished,
    )


async def _closed(phase: _Phase, work: Iterator[Work], concurrency: int, until: Until) -> None:
    def is_over() -> bool:
        return until.seconds is not None and clock() - phase.origin >= until.seconds

    async def work_off() -> None:
        pause = 0.0
        for each in work:
            await asyncio.sleep(pause)
            if is_over():
                return
            outcome = (await phase.send(each, clock())).outcome
            # After a refusal, wait as long as the server asks: retrying faster would measure only
            # the speed of refusals.
            pause = (outcome.retry_after or 0.0) if isinstance(outcome, Failure) else 0.0

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work_off())


async def _open(phase: _Phase, work: Iterator[Work], times: Iterator[float], until: Until) -> None:
    async with asyncio.TaskGroup() as requests:
        for after in times:
            if until.seconds is not None and after >= until.seconds:
                break
            # Made before it is due, so that it is sent on time.
            if (each := next(work, None)) is None:
                break
            intended = phase.origin + after
            await asyncio.sleep(max(0.0, intended - clock()))
            requests.create_task(phase.send(each, intended))


async def _interrupted(sending: Coroutine[None, None, None]) -> bool:
    """Awaits `sending`; returns whether a signal ended it."""
    task = asyncio.create_task(sending)
    loop = asyncio.get_running_loop()
    stopping = (signal.SIGINT, signal.SIGTERM)

    def restore() -> None:
        for signum in stopping:
            loop.remove_signal_handler(signum)

    def stop() -> None:
        restore()
        task.cancel()

    for signum in stopping:
        loop.add_signal_handler(signum, stop)
    try:
        await asyncio.wait({task})
    finally:
        restore()
    if task.cancelled():
        return True
    task.result()  # raises its error, if any
    return False
