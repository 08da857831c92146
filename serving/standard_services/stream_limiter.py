"""A bound on streams that a caller may hold open without end: health watches and reflection.

Each costs the server some 30 KB for as long as its caller likes, and health needs no API key.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeAlias

import grpc

from serving.errors import resource_exhausted

# A caller needs one stream for each service that it watches.
MAX_PER_CONNECTION = 16
MAX_PER_ADDRESS = 256
# Of a server in all: together they take some 30 MB.
MAX_IN_ALL = 1024

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StreamLimiter:
    """Counts the open streams of a server. Lives on the event loop."""

    def __init__(self) -> None:
        self._by_connection: Counter[str] = Counter()
        self._by_address: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, context: Context) -> Iterator[None]:
        """Counts a call for as long as the block lasts.

        Raises:
            RequestError: RESOURCE_EXHAUSTED at any bound.
        """
        connection = context.peer()  # address and port
        address, _, _port = connection.rpartition(":")
        if self._by_connection[connection] >= MAX_PER_CONNECTION:
            raise resource_exhausted(
                f"this connection has {MAX_PER_CONNECTION} health and reflection streams "
                "open, which is the most",
                "streams of a connection",
            )
        if self._by_address[address] >= MAX_PER_ADDRESS:
            raise resource_exhausted(
                f"this address has {MAX_PER_ADDRESS} health and reflection streams open, which "
                "is the most; Health/Check always answers",
                "streams of an address",
            )
        if self._by_address.total() >= MAX_IN_ALL:
            raise resource_exhausted(
                f"this server has {MAX_IN_ALL} health and reflection streams open, which is "
                "the most; Health/Check always answers",
                "streams of the server",
            )
        held = ((self._by_connection, connection), (self._by_address, address))
        for counter, key in held:
            counter[key] += 1
        try:
            yield
        finally:
            for counter, key in held:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
