"""Every process is restarted, one after the other, under load that never pauses: no call fails.

The clients do what gRPC's own libraries do when told: they know both gateways, call those whose
health service says SERVING, wait while none does, and retry a call that ended as UNAVAILABLE before
it had an answer.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest

from llama.v1.chat_pb2 import TextCompleteRequest, TextCompleteStreamRequest
from llama.v1.chat_pb2_grpc import ChatServiceStub
from llama.v1.sampling_pb2 import SamplingParams

pytestmark = pytest.mark.alone

WORKERS = 6
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "llama.v1.ChatService"},
    "methodConfig": [
        {
            "name": [{"service": "llama.v1.ChatService"}],
            # The only tokenizer service is restarted, too: no gateway serves for a moment.
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


class Load:
    """Workers that call without a pause, until the block ends; `calls` counts their answers."""

    def __init__(self, addresses: list[str]) -> None:
        self.calls = 0
        self._target = f"ipv4:{','.join(addresses)}"
        self._stopping = False
        self._answered = asyncio.Condition()

    async def run(self) -> None:
        """Raises what the first failed call raised."""
        options = [
            ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
            ("grpc.max_reconnect_backoff_ms", 1000),  # as our own client
        ]
        async with grpc.aio.insecure_channel(self._target, options) as channel:
            stub = ChatServiceStub(channel)
            async with asyncio.TaskGroup() as tasks:
                for number in range(WORKERS):
                    tasks.create_task(self._work(number, stub))

    def stop(self) -> None:
        self._stopping = True

    async def goes_on(self) -> None:
        """Waits until so many calls as there are workers were answered since now."""
        wanted = self.calls + WORKERS
        async with self._answered:
            await self._answered.wait_for(lambda: self.calls >= wanted)

    async def _work(self, number: int, stub: Any) -> None:
        sampling = SamplingParams(ignore_eos=True, max_gen_len=10 + 25 * number, seed=number)
        while not self._stopping:
            if number % 2:
                request = TextCompleteRequest(prompts=["The llama"], sampling=sampling)
                [answer] = (await stub.TextComplete(request)).predictions
                usage = answer.usage
            else:
                streamed = TextCompleteStreamRequest(prompts=["The llama"], sampling=sampling)
                *_, last = [event async for event in stub.TextCompleteStream(streamed)]
                usage = last.event.finished.usage
            assert usage.completion_tokens == sampling.max_gen_len
            async with self._answered:
                self.calls += 1
                self._answered.notify_all()


def until_clients_have_found(gateway: Any) -> None:
    """Clients come back to an address a moment after it answers; only then may the next one go."""
    labels = {"grpc_service": "llama.v1.ChatService", "grpc_method": "TextComplete"}
    while not gateway.scrape().value("grpc_server_handled_total", **labels):
        time.sleep(0.05)


async def test_no_call_fails_while_every_process_is_restarted(
    fleet: Callable[..., AbstractContextManager[Any]],
) -> None:
    with fleet(replicas=2, gateways=2) as running, contextlib.ExitStack() as again:
        load = Load([each.address for each in running.gateways])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await load.goes_on()
            for process in (*running.models, running.tokenizer, *running.gateways):
                assert await asyncio.to_thread(process.stop) == 0
                restarted = again.enter_context(process.again())
                await asyncio.to_thread(restarted.wait_until, serving=True)
                await asyncio.to_thread(running.wait_for_replicas, 2)
                await load.goes_on()
                if process in running.gateways:
                    await asyncio.to_thread(until_clients_have_found, restarted)
            load.stop()
