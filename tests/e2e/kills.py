"""Replicas that are killed under the streams that they serve."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import grpc

from llama.v1.model_pb2 import GetLoadRequest, GetLoadResponse
from llama.v1.model_pb2_grpc import ModelServiceStub
from tests.e2e.deployments import Fleet
from tests.e2e.processes import ServiceProcess

ATTEMPTS = 6

Answers = TypeVar("Answers")


def failovers_of(fleet: Fleet) -> float:
    """How often its gateway has continued a sequence on another replica."""
    return fleet.gateway.scrape().value("chasqui_gateway_failovers_total")


async def until_failover(
    fleet: Fleet, attempt: Callable[[], Awaitable[Answers]], sequences: int = 1
) -> Answers:
    """The answers of the first attempt in which so many sequences failed over.

    On a fast machine a replica may have made all its tokens when the signal reaches it. Such an
    attempt shows nothing.
    """
    failovers = []
    for _ in range(ATTEMPTS):
        before = failovers_of(fleet)
        answers = await attempt()
        failovers.append(failovers_of(fleet) - before)
        if failovers[-1] >= sequences:
            return answers
    raise AssertionError(f"sequences that failed over in each attempt: {failovers}")


async def busiest(replicas: Sequence[ServiceProcess], tokens: int) -> int:
    """Waits until a replica has made so many more tokens; which one runs most sequences then.

    It asks the replicas, because a client may hear of the tokens when all of them are made.
    """
    async with AsyncExitStack() as channels:
        stubs = [
            ModelServiceStub(
                await channels.enter_async_context(grpc.aio.insecure_channel(each.address))
            )
            for each in replicas
        ]
        before = [load.completion_tokens for load in await _loads(stubs)]
        while True:
            now = await _loads(stubs)
            if any(b.completion_tokens - a >= tokens for a, b in zip(before, now, strict=True)):
                return max(range(len(now)), key=lambda i: now[i].running_sequences)


async def _loads(stubs: list[Any]) -> list[GetLoadResponse]:
    return [await stub.GetLoad(GetLoadRequest()) for stub in stubs]
