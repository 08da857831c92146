"""A limit on streams that a client may hold open for ever: health watches and reflection.

Each costs the server some 30 KB while it is open, and health needs no API key.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeAlias

import grpc

from serving.errors import resource_exhausted

# A client needs one stream for each service that it watches.
MAX_PER_CONNECTION = 16
MAX_PER_ADDRESS = 256
# All streams of a server together take some 30 MB.
MAX_IN_ALL = 1024

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StreamLimiter:
    """Counts the open streams of a server. Not thread-safe: belongs to the event loop."""

    def __init__(self) -> None:
        self._by_connection: Counter[str] = Counter()
        self._by_address: Counter[str] = Counter()

    @contextlib.contextmanager
    def acquire(self, context: Context) -> Iterator[None]:
        """Counts a call until the end of the block.

        Raises:
            RequestError: RESOURCE_EXHAUSTED at any of the limits.
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
        counters = ((self._by_connection, connection), (self._by_address, address))
        for counter, key in counters:
            counter[key] += 1
        try:
            yield
        finally:
            for counter, key in counters:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
