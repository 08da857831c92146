"""Health checks that tell when a service hangs: what Kubernetes' liveness probe is there.

The service's own health is asked, not what the gateway knows of it: the gateway wants a key of
those who ask, and has no part in the restart.
"""

import asyncio
from typing import Any

import grpc

from client.connection.channel import channel_options

PERIOD = 5.0  # seconds from one check to the next
TIMEOUT = 5.0  # seconds for an answer
MAX_UNANSWERED = 3  # in a row


async def until_hung(address: str, most_not_serving: float) -> str:
    """Waits until the service at `address` hangs; returns how that shows.

    Args:
        address: where it listens.
        most_not_serving: seconds that it may answer other than SERVING, as it does while it drains.
    """
    # The client alone is installed without this module.
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
