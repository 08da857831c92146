"""Health checks that detect a service that hangs, like Kubernetes' liveness probes.

They ask the service itself and not the gateway, which may require an API key.
"""

import asyncio
from typing import Any

import grpc

from client.connection.channel import channel_options

PERIOD = 5.0  # seconds between two checks
TIMEOUT = 5.0  # seconds for an answer
MAX_UNANSWERED = 3  # in a row


async def until_hung(address: str, most_not_serving: float) -> str:
    """Waits until the service at `address` hangs; returns the symptom.

    It may answer with a status other than SERVING, as while it drains, for `most_not_serving`
    seconds.
    """
    # Not at the top, because an installation of only the client lacks this module.
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    request = health_pb2.HealthCheckRequest()
    unanswered = not_serving = 0  # checks in a row
    async with grpc.aio.insecure_channel(address, channel_options(address)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            await asyncio.sleep(PERIOD)
            try:
                response = await health.Check(request, timeout=TIMEOUT)
            except grpc.aio.AioRpcError:
                unanswered += 1
                if unanswered == MAX_UNANSWERED:
                    return f"it left {unanswered} health checks in a row unanswered"
                continue
            unanswered = 0
            is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
            not_serving = 0 if is_serving else not_serving + 1
            if not_serving * PERIOD > most_not_serving:
                return f"its health was not SERVING for {not_serving * PERIOD:g} seconds"
