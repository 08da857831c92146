"""A client's connection, as uvicorn's protocol with bounds: on the number of connections, on the
size of a request's head, and on the time that it takes to arrive.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gateway.http.openai.errors import error_body
from serving.intake.grpc_options import METADATA_BYTES


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of each connection; times in seconds."""

    connections: int  # of all clients
    head_timeout: float  # from the first byte of a request's head to its last
    idle: float  # from an answer to the next request


class Connection(H11Protocol):
    """Cuts off a client that exceeds the limits."""

    def __init__(self, config: Config, state: ServerState, limits: ConnectionLimits) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # For the application: its only way to a connection that does not read.
        self.app_state = {"abort": transport.abort}
        if len(self.connections) > self._limits.connections:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering or self.transport.is_closing():
            self._cancel_timer()
        elif self._head_timer is None:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuses a malformed request; h11's error, which is being handled, has the status."""
        if self._is_answering:
            self.transport.abort()
            return
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.refuse(status, str(error) if error else msg)

    def refuse(self, status: int, message: str) -> None:
        """Answers with an error and closes the connection."""
        self._cancel_timer()
        body = json.dumps(error_body(message, status, "malformed_request")).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_timeout, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def protocol_config(app: Callable[..., Any], limits: ConnectionLimits) -> Config:
    """The settings of uvicorn's protocol."""
    config = Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        # Its log has a line for every malformed request, which costs a client nothing.
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.idle,  # type: ignore[arg-type]  # asyncio accepts fractions
        h11_max_incomplete_event_size=METADATA_BYTES,
        reset_contextvars=True,  # the request's caller and id must not reach the next one
    )
    config.load()
    return config
