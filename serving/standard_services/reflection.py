"""Server reflection, in version v1 and in v1alpha, which older tools use.

grpcio-reflection serves v1alpha only, and does not find a method by its full name. The versions
differ only in the package's name, so one servicer serves both.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serving.errors import RequestError
from serving.standard_services.stream_limiter import StreamLimiter

V1, V1ALPHA = "grpc.reflection.v1", "grpc.reflection.v1alpha"
SERVICE_NAMES = tuple(f"{package}.ServerReflection" for package in (V1, V1ALPHA))

Request: TypeAlias = reflection_pb2.ServerReflectionRequest
Response: TypeAlias = reflection_pb2.ServerReflectionResponse
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def enable(
    server: grpc.aio.Server, names: Iterable[str], limiter: StreamLimiter, receive_timeout: float
) -> None:
    """Lets clients look up the services of these full names, and reflection itself.

    Each request of a stream must arrive within `receive_timeout` seconds.
    """
    _add_v1_descriptors()
    servicer = _Servicer([*names, *SERVICE_NAMES], limiter, receive_timeout)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo, Request.FromString, Response.SerializeToString
    )
    for name in SERVICE_NAMES:
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


class _Servicer(reflection.aio.ReflectionServicer):
    def __init__(
        self, names: Iterable[str], limiter: StreamLimiter, receive_timeout: float
    ) -> None:
        super().__init__(names)
        self._limiter = limiter
        self._receive_timeout = receive_timeout

    async def ServerReflectionInfo(  # type: ignore[override]  # the stubs type it as a coroutine
        self, requests: AsyncIterator[Request], context: Context
    ) -> AsyncIterator[Response]:
        with self._limiter.acquire(context):
            while (request := await self._next(requests)) is not None:
                rewritten = _single(_by_service(request))
                responses: Any = super().ServerReflectionInfo(rewritten, context)
                async for response in responses:
                    response.original_request.CopyFrom(request)
                    yield response

    async def _next(self, requests: AsyncIterator[Request]) -> Request | None:
        try:
            async with asyncio.timeout(self._receive_timeout):
                return await anext(requests, None)
        except TimeoutError:
            message = f"no further request arrived within {self._receive_timeout:g} seconds"
            raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None


def _add_v1_descriptors() -> None:
    """Adds v1's file, made from v1alpha's, to the descriptor pool."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(text, FileDescriptorProto()))


async def _single(request: Request) -> AsyncIterator[Request]:
    yield request


def _by_service(request: Request) -> Request:
    """The request; if it asks for a method, one for that method's service instead."""
    name = request.file_containing_symbol
    try:
        method = descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return request
    return Request(file_containing_symbol=method.containing_service.full_name)
