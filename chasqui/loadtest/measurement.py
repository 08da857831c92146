"""A whole measurement: its plan, its execution and its results."""

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
    """The plan of a measurement; `warmup` requests are sent first and not measured."""

    target: str
    loop: Closed | Open
    until: Until
    warmup: int
    workload: Workload
    timeout: float | None  # seconds
    connections: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run, with everything that is needed to judge or repeat it."""

    plan: Plan
    model: Model
    run: Run
    summary: Summary


async def measure(plan: Plan, model: Model, access: Access = OPEN) -> Measurement | None:
    """Carries out the plan; None if a signal ended it during the warm-up.

    InvalidRequestError: the requests cannot be sent. Errors of sent requests are in the records.
    """
    # A first request, to raise the error of one that cannot be sent here and not within the run.
    next(work(plan.workload, model))
    requests = work(plan.workload, model)
    async with Sender(plan.target, plan.connections, plan.timeout, access) as sender:
        if plan.warmup and (await run(sender, requests, plan.loop, Until(plan.warmup))).interrupted:
            return None
        measured = await run(sender, requests, plan.loop, plan.until)
    return Measurement(plan, model, measured, summarize(measured))
