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
# Of a server in all: together they take some 30 MB.
MAX_IN_ALL = 1024

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HeldStreams:
    """Counts the open streams of a server. Lives on the event loop."""

    def __init__(self) -> None:
        self._by_connection: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, context: Context) -> Iterator[None]:
        """Counts a call for as long as the block lasts.

        Raises:
            RequestError: RESOURCE_EXHAUSTED at either bound.
        """
        connection = context.peer()  # address and port
        if self._by_connection[connection] >= MAX_PER_CONNECTION:
            raise resource_exhausted(
                f"this connection has {MAX_PER_CONNECTION} health and reflection streams "
                "open, which is the most",
                "streams of a connection",
            )
        if self._by_connection.total() >= MAX_IN_ALL:
            raise resource_exhausted(
                f"this server has {MAX_IN_ALL} health and reflection streams open, which is "
                "the most; Health/Check always answers",
                "streams of the server",
            )
        self._by_connection[connection] += 1
        try:
            yield
        finally:
            self._by_connection[connection] -= 1
            if not self._by_connection[connection]:
                del self._by_connection[connection]
