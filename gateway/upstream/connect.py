"""Channels to the services behind the gateway: plaintext, or mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import grpc

from serving.security.tls import TlsFiles, UpstreamCertificates
from serving.server import channel

# Shorter than session.LONGEST_PAUSE, so that a failure to connect does not count as a session.
CONNECT_SECONDS = 4.0

# Parts of gRPC's messages about TLS, and what they mean for the operator.
_TLS_PROBLEMS = (
    ("WRONG_VERSION_NUMBER", "it speaks plaintext; --upstream_ca makes this gateway speak TLS"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by a CA in --upstream_ca"),
    ("Hostname Verification", "its certificate has another name: set --upstream_name"),
    (
        "Socket closed",
        "it may speak TLS or ask for a certificate: set --upstream_ca, --upstream_cert",
    ),
)


class Connect(Protocol):
    """A function that makes channels."""

    def __call__(self, target: str, name: str | None = None) -> grpc.aio.Channel:
        """A new channel to `target`; `name` is the DNS name that it was resolved from, if any."""


def plaintext(target: str, name: str | None = None) -> grpc.aio.Channel:  # noqa: ARG001
    return channel(target)


def connector(files: TlsFiles | None, server_name: str | None) -> Connect:
    """The function that makes this gateway's channels to the services behind it.

    Args:
        files: for TLS; None for plaintext.
        server_name: the name that the certificates must have; None: the name in the address.
    """
    if files is None:
        return plaintext
    certificates = UpstreamCertificates(files, server_name)

    def connect(target: str, name: str | None = None) -> grpc.aio.Channel:
        return channel(target, certificates.expecting(name))

    return connect


@asynccontextmanager
async def connected(
    connect: Connect, target: str, name: str | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel for one session; a new one each time, because certificates may have changed.

    If it cannot connect in time, the first call on it fails with the reason.
    """
    async with connect(target, name) as new:
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                await new.channel_ready()
        yield new


def failure_reason(error: grpc.aio.AioRpcError) -> str:
    """Why a call failed, for the operator of the gateway."""
    details = error.details() or ""
    if details.startswith("failed to connect"):
        for sign, meaning in _TLS_PROBLEMS:
            if sign in details:
                return f"{error.code().name}: {details} ({meaning})"
    return f"{error.code().name}: {details}"
