"""Server reflection, in version v1 and in v1alpha, for which older tools ask.

grpcio-reflection serves v1alpha alone, and does not find a method by its full name. The versions
differ in the package's name alone, so one servicer answers for both.
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
    server: grpc.aio.Server, names: Iterable[str], held: StreamLimiter, receive_timeout: float
) -> None:
    """Lets callers look up the services of these full names, and reflection itself.

    `receive_timeout` is in seconds, for each request of a stream to arrive.
    """
    _describe_v1()
    servicer = _Servicer([*names, *SERVICE_NAMES], held, receive_timeout)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo, Request.FromString, Response.SerializeToString
    )
    for name in SERVICE_NAMES:
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


class _Servicer(reflection.aio.ReflectionServicer):
    def __init__(self, names: Iterable[str], held: StreamLimiter, receive_timeout: float) -> None:
        super().__init__(names)
        self._held = held
        self._receive_timeout = receive_timeout

    async def ServerReflectionInfo(  # type: ignore[override]  # the stubs type it as a coroutine
        self, requests: AsyncIterator[Request], context: Context
    ) -> AsyncIterator[Response]:
        with self._held.hold(context):
            while (request := await self._next(requests)) is not None:
                asked = _alone(_findable(request))
                responses: Any = super().ServerReflectionInfo(asked, context)
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


def _describe_v1() -> None:
    """Adds v1's file to the descriptors that are known here, made from v1alpha's."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(text, FileDescriptorProto()))


async def _alone(request: Request) -> AsyncIterator[Request]:
    yield request


def _findable(request: Request) -> Request:
    """The request; where it asks for a method, then for that method's service."""
    name = request.file_containing_symbol
    try:
        method = descriptor_pool.Default().FindMethodByName(name)
    except KeyError:
        return request
    return Request(file_containing_symbol=method.containing_service.full_name)
