"""Certificates of servers and clients, read from PEM files, and again when the files change.

A server checks its files at every new connection, a client whenever it makes a channel. Changed
files are used only if certificate and key match: if they are incomplete or do not match, that is
logged and the certificates in use stay.
"""

import copy
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from serving.errors import StartError
from serving.security.watched_files import WatchedFiles

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `cert` is a chain, its own certificate first; `ca` has the trusted ones."""

    cert: Path | None
    key: Path | None
    ca: Path | None

    def __iter__(self) -> Iterator[Path | None]:
        return iter((self.cert, self.key, self.ca))


@dataclass(frozen=True, slots=True)
class _Pem:
    """The contents of the files."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


class ServerCertificates:
    """A server's certificate. With `ca`, clients need a certificate that one of those signed.

    Raises:
        StartError: a file cannot be read, or is not of the right kind.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = _CurrentPem(files)
        self._needs_client = files.ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._files.pem),
            self._changed,  # type: ignore[arg-type]  # the stubs forget that None means no change
            self._needs_client,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For servers of other protocols than gRPC; each handshake uses the current files."""
        current = _server_context(self._files.paths)

        def choose(connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            nonlocal current
            if self._files.refresh():
                try:
                    current = _server_context(self._files.paths)
                except (OSError, ssl.SSLError) as error:  # changed again since they were checked
                    _log.error("certificates not reloaded, the old ones stay", reason=str(error))
            connection.context = current

        context = _server_context(self._files.paths)
        context.sni_callback = choose  # called in every handshake, also if no name is sent
        return context

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's own threads, before each handshake."""
        return _configuration(self._files.pem) if self._files.refresh() else None


class UpstreamCertificates:
    """The certificates that a client trusts, and its own for servers that ask for one.

    Raises:
        StartError: a file cannot be read, or is not of the right kind.
    """

    def __init__(self, files: TlsFiles, name: str | None = None) -> None:
        self._files = _CurrentPem(files)
        # The name that a server's certificate must have, instead of the connected address.
        self.options = () if name is None else (("grpc.ssl_target_name_override", name),)

    def expecting(self, name: str | None) -> "UpstreamCertificates":
        """The same for a server that was found by its name: its certificate must have that name."""
        if name is None or self.options:
            return self
        expecting = copy.copy(self)
        expecting.options = (("grpc.ssl_target_name_override", name),)
        return expecting

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials from the current files."""
        self._files.refresh()
        pem = self._files.pem
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


class _CurrentPem:
    """The last valid contents of the files."""

    def __init__(self, files: TlsFiles) -> None:
        self.paths = files
        self._lock = threading.Lock()
        self._watched = WatchedFiles(files)
        try:
            self.pem = _read(files)
        except ValueError as error:
            raise StartError(str(error)) from error

    def refresh(self) -> bool:
        """Reads the files if they have changed since the last check; True if `pem` is new."""
        with self._lock:
            if not self._watched.changed():
                return False
            try:
                self.pem = _read(self.paths)
            except ValueError as error:
                _log.error("certificates not reloaded, the old ones stay", reason=str(error))
                return False
        _log.info("certificates reloaded", files=[str(path) for path in self.paths if path])
        return True


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    if files.cert and files.key:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    if files.ca:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _configuration(pem: _Pem) -> grpc.ServerCertificateConfiguration:
    pairs = [(pem.key, pem.cert)] if pem.key and pem.cert else []
    return grpc.ssl_server_certificate_configuration(pairs, pem.ca)


def _read(files: TlsFiles) -> _Pem:
    """The contents; ValueError with the file's name if gRPC could not use them."""
    with _errors_naming(files.cert, files.key):
        if files.cert and files.key:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without this, OpenSSL would ask for a password on the terminal.
            context.load_cert_chain(files.cert, files.key, password=_no_password)
    with _errors_naming(files.ca):
        if files.ca:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.ca)
    contents = []
    for path in files:
        with _errors_naming(path):
            contents.append(path.read_bytes() if path else None)
    return _Pem(*contents)


@contextmanager
def _errors_naming(*paths: Path | None) -> Iterator[None]:
    names = " and ".join(str(path) for path in paths if path)
    try:
        yield
    except ssl.SSLError as error:
        # OpenSSL has no reason for some errors, only numbers.
        reason = (error.reason or "no PEM file of the right kind").replace("_", " ").lower()
        raise ValueError(f"{names}: not usable as certificate or key: {reason}") from error
    except OSError as error:
        raise ValueError(f"{names}: cannot be read: {error.strerror}") from error


def _no_password() -> str:
    return ""
