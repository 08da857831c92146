"""A TCP proxy whose connections a test can cut, as a network does: without a word to either end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes bytes on, until it cuts all of its connections."""

    address: str = ""
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)
    _connections: list["asyncio.Task[None]"] = field(default_factory=list)

    @property
    def connections(self) -> int:
        """How many there were."""
        return len(self._connections)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def end(self) -> None:
        self.cut()
        await asyncio.gather(*self._connections)

    def connect(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connections.append(asyncio.create_task(self._connect(target, reader, writer)))

    async def _connect(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, port = target.rsplit(":", 1)
        to_reader, to_writer = await asyncio.open_connection(host, int(port))
        self._writers += [writer, to_writer]
        await asyncio.gather(_pass_on(reader, to_writer), _pass_on(to_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:  # it was cut
        pass
    finally:
        writer.close()


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy in front of `target`, until the block ends."""
    proxy = Proxy()
    server = await asyncio.start_server(
        lambda reader, writer: proxy.connect(target, reader, writer), "127.0.0.1", 0
    )
    host, port = server.sockets[0].getsockname()
    proxy.address = f"{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
