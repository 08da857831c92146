"""grpc.health.v1 for one service: the same state under all of its names, and a liveness name.

This is not the servicer of grpcio-health-checking, because that one forgets all watchers of a name
as soon as one of them leaves, and its Watch streams outlive a drain, which would then always take
the whole grace period.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from serving.errors import RequestError, unavailable
from serving.standard_services.stream_limiter import StreamLimiter

# Always SERVING, for orchestrators that restart a server that hangs. A gateway without a model is
# NOT_SERVING under the other names, and a restart would not help it.
LIVENESS = "liveness"

_log = structlog.stdlib.get_logger(__name__)


class Health(health_pb2_grpc.HealthServicer):
    """`limiter` bounds the number of Watch streams."""

    def __init__(self, names: Iterable[str], serving: bool, limiter: StreamLimiter) -> None:
        self._names = {"", LIVENESS, *names}
        self._limiter = limiter
        self._serving = serving
        self._draining = False
        self._closed = False
        self._changed = asyncio.Condition()

    @property
    def serving(self) -> bool:
        return self._serving

    async def set_serving(self, serving: bool) -> None:
        """Sets the state of all names; has no effect once the server drains."""
        async with self._changed:
            if self._draining or serving == self._serving:
                return
            self._serving = serving
            self._changed.notify_all()
        _log.info("health changed", serving=serving)

    async def drain(self) -> None:
        """Sets NOT_SERVING for good."""
        await self.set_serving(False)
        self._draining = True

    async def close(self) -> None:
        """Ends all Watch streams, after each has sent its last state."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(
        self,
        request: HealthCheckRequest,
        _context: object,
    ) -> HealthCheckResponse:
        if request.service not in self._names:
            known = ", ".join(sorted(self._names - {""}))
            message = f"no service {request.service!r} here; there are {known}"
            raise RequestError(grpc.StatusCode.NOT_FOUND, message)
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self,
        request: HealthCheckRequest,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[HealthCheckResponse]:
        sent: int | None = None

        def has_news() -> bool:
            return self._closed or self._status(request.service) != sent

        with self._limiter.acquire(context):
            while True:
                async with self._changed:
                    await self._changed.wait_for(has_news)
                status = self._status(request.service)
                if status == sent:
                    raise unavailable("the server is shutting down")
                yield HealthCheckResponse(status=status)
                sent = status

    def _status(self, name: str) -> int:
        if name not in self._names:
            return HealthCheckResponse.SERVICE_UNKNOWN
        if name == LIVENESS:
            return HealthCheckResponse.SERVING
        return HealthCheckResponse.SERVING if self._serving else HealthCheckResponse.NOT_SERVING
