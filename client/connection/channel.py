"""gRPC channels to a gateway, with TLS and API key, for the synchronous and the asyncio client."""

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from client import arguments
from client.connection import targets

DEFAULT_TARGET = "127.0.0.1:50051"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # The gateway limits its answers, and its operator may allow more than gRPC's 4 MiB.
    ("grpc.max_receive_message_length", -1),
    # A server that vanished without closing the connection is noticed within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A restarted server is found by the next call: gRPC's default is two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Options = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS settings, with PEM files. `ca`: the trusted authorities, by default gRPC's public ones.

    `cert` and `key` are for gateways that ask for a client certificate; `name` is the name that the
    gateway's certificate must have, by default the target's host.
    """

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError if a file cannot be read, ValueError if its contents cannot be used."""
        self.context()
        ca, key, cert = (
            Path(path).read_bytes() if path else None for path in (self.ca, self.key, self.cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, whose errors say more; raises like `credentials`."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: give both")
        used = self.ca
        try:
            context = ssl.create_default_context(cafile=used)
            used = self.cert
            if self.cert is not None:
                # With an empty password OpenSSL does not ask for one on the terminal.
                context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            # OpenSSL gives no reason if the file contains no certificate at all.
            reason = (error.reason or "it holds none").replace("_", " ").lower()
            raise ValueError(f"{used} cannot be used as a certificate: {reason}") from error
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # newer Pythons are stricter than gRPC
        context.set_alpn_protocols(["h2"])
        return context


@dataclass(frozen=True, slots=True)
class Access:
    """The TLS settings and the key of a client."""

    tls: Tls | None = None
    api_key: str | None = field(default=None, repr=False)


OPEN = Access()


def channel_options(target: str, tls: Tls | None = None) -> Options:
    """Channel options; a target on this machine bypasses the proxy of the environment.

    ValueError: it is not a valid target.
    """
    options: Options = _OPTIONS
    try:
        is_local = targets.is_local(target)
    except ValueError as error:
        raise ValueError(f"target {error}") from None
    if is_local:
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
    """A channel for stubs that sends the API key with every call. ValueError: it is not valid."""
    if api_key is None:
        return channel
    check_key(api_key)
    return cast("C", _KeyedChannel(channel, api_key))


def check_key(api_key: str) -> None:
    """Raises ValueError if gRPC metadata cannot carry the API key."""
    if not re.fullmatch("[ -~]+", arguments.text(api_key)):
        raise ValueError("an API key must consist of printable ASCII characters")


class _KeyedChannel:
    """The part of a channel that stubs use, because gRPC's interceptors would wrap every call."""

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
