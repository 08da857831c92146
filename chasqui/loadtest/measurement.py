"""A whole measurement: what is planned, and what comes of it."""

from dataclasses import dataclass

from chasqui.loadtest.generator import Closed, Open, Until, run
from chasqui.loadtest.records import Run
from chasqui.loadtest.sender import Sender
from chasqui.loadtest.summary import Summary, summarize
from chasqui.loadtest.workload import Workload, work
from client.connection.channel import OPEN, Access
from client.results import Model


@dataclass(frozen=True, slots=True)
class Plan:
    """A measurement to make; `warmup` requests go first, in the same loop, and are not counted."""

    target: str
    loop: Closed | Open
    until: Until
    warmup: int
    workload: Workload
    timeout: float | None  # seconds
    connections: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run with all that one must know to judge or repeat it."""

    plan: Plan
    model: Model
    run: Run
    summary: Summary


async def measure(plan: Plan, model: Model, access: Access = OPEN) -> Measurement | None:
    """Carries the plan out; None if a signal came before the part that counts.

    InvalidRequestError: the requests cannot be sent at all. The results of those that are sent are
    in the measurement.
    """
    # Made for its errors only: inside the run they would be the generator's own.
    next(work(plan.workload, model))
    requests = work(plan.workload, model)
    async with Sender(plan.target, plan.connections, plan.timeout, access) as sender:
        if plan.warmup and (await run(sender, requests, plan.loop, Until(plan.warmup))).interrupted:
            return None
        measured = await run(sender, requests, plan.loop, plan.until)
    return Measurement(plan, model, measured, summarize(measured))
