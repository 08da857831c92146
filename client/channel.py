"""What the synchronous and the asyncio client have in common below their methods: how to reach a
gateway, how to know it, and how to be known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

DEFAULT_TARGET = "127.0.0.1:50051"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # The gateway limits its answers, and its operator may allow more than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # A server that vanished without a word is noticed within half a minute, also mid-stream.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # After a restart of the server the next call finds it: gRPC's own bound is two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_LOOPBACK = ("127.", "localhost:", "[::1]:")

Options = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption, with PEM files. `ca`: whom to trust, by default gRPC's list of public ones.

    `cert` and `key` are for gateways that ask for a certificate; `name` is what the gateway's
    certificate must hold, by default the target's host.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """OSError where a file cannot be read."""
        ca, key, cert = (
            path.read_bytes() if path else None for path in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True, slots=True)
class Access:
    """What a gateway that is not open to everybody asks for."""

    tls: Tls | None = None
    api_key: str | None = field(default=None, repr=False)


OPEN = Access()


def channel_options(target: str, tls: Tls | None = None) -> Options:
    """Channel options; an `http_proxy` in the environment is not asked for this machine itself."""
    options: Options = _OPTIONS
    if target.startswith(_LOOPBACK):
        options = (*options, ("grpc.enable_http_proxy", 0))
    if tls is not None and tls.name is not None:
        options = (*options, ("grpc.ssl_target_name_override", tls.name))
    return options


def open_channel(target: str, tls: Tls | None) -> grpc.Channel:
    options = channel_options(target, tls)
    if tls is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, tls.credentials(), options)


def open_aio_channel(target: str, tls: Tls | None, *more: tuple[str, int]) -> grpc.aio.Channel:
    options = (*channel_options(target, tls), *more)
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, tls.credentials(), options)


C = TypeVar("C", grpc.Channel, grpc.aio.Channel)


def with_key(channel: C, api_key: str | None) -> C:
    """For stubs: the channel, with an API key sent in each of its calls."""
    return channel if api_key is None else cast("C", _KeyedChannel(channel, api_key))


class _KeyedChannel:
    """The part of a channel that stubs use; gRPC's interceptors would wrap each call's object."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel, api_key: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., object]:  # noqa: ANN401
        return self._with_key(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., object]:  # noqa: ANN401
        return self._with_key(self._channel.unary_stream(*args, **kwargs))

    def _with_key(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(
            *args: object, metadata: tuple[tuple[str, str], ...] | None = None, **kwargs: object
        ) -> object:
            return method(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)

        return call
