"""Finds out why a gateway cannot be reached: a proxy, or TLS settings that do not match.

gRPC reports these only as "OK" or "Socket closed". So after a call that reached no server, this
connects once more, with the TLS of Python's standard library, and examines the answer.
"""

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from client.connection import targets
from client.errors import ChasquiError, ConnectionSettingsError, UnreachableError

if TYPE_CHECKING:
    from client.connection.channel import Tls

# Timeout of each socket operation, in seconds.
PATIENCE = 5.0

# The beginning of every HTTP/2 connection: the preface, then an empty SETTINGS frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = bytes((4,))  # the type of the frame that a server begins with
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_WRONG_NAME = frozenset({62, 64})
_OWN_TLS = "give the client tls=Tls(ca=…), the command --ca FILE, or --tls for a public authority"


def explained(error: ChasquiError, target: str, tls: "Tls | None") -> ChasquiError:
    """The error, or a ConnectionSettingsError if a reason is found. Blocks."""
    if not isinstance(error, UnreachableError) or error.request_id is not None:
        return error
    if (proxy := targets.proxy(target)) is not None:
        return ConnectionSettingsError(
            f"{error.message}, {proxy}; no_proxy={targets.addresses(target)[0].host} exempts it"
        )
    # gRPC has tried all addresses of a target; one is enough for the diagnosis.
    for address in targets.addresses(target)[:1]:
        problem = _problem(address, tls)
        if problem is not None:
            return ConnectionSettingsError(f"{target} {problem}")
    return error


async def explained_aio(error: ChasquiError, target: str, tls: "Tls | None") -> ChasquiError:
    """The same, in a thread, so that the event loop is not blocked."""
    if not isinstance(error, UnreachableError):
        return error
    return await asyncio.to_thread(explained, error, target, tls)


def _problem(address: targets.Address, tls: "Tls | None") -> str | None:
    """The mismatch between client and server; None if there is none."""
    try:
        if _speaks_tls(address):
            if tls is None:
                return f"speaks TLS, and this client does not: {_OWN_TLS}"
            return _tls_problem(address, tls)
        answer = _plaintext_answer(address)
        if answer and answer[3:] != _SETTINGS:
            return "answers, but speaks neither gRPC nor TLS"
        if answer and tls is not None:
            return "speaks plaintext, and this client TLS: leave out tls=, or --tls and --ca"
    except (OSError, ValueError):  # no answer or an unknown name, which gRPC has reported
        pass
    return None


def _speaks_tls(address: targets.Address) -> bool:
    """Whether the server answers a TLS handshake, even if with a refusal."""
    try:
        with _connected(address) as plain, _anyone().wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except ConnectionError:
        return False


def _plaintext_answer(address: targets.Address) -> bytes:
    """The server's answer to plaintext HTTP/2, up to the type of its first frame."""
    with suppress(ConnectionError), _connected(address) as plain:
        plain.sendall(_HELLO)
        return plain.recv(4, socket.MSG_WAITALL)
    return b""


def _tls_problem(address: targets.Address, tls: "Tls") -> str | None:
    name, reason = tls.name or address.host, "without a word"
    try:
        with (
            _connected(address) as plain,
            tls.context().wrap_socket(
                plain, server_hostname=name, suppress_ragged_eofs=False
            ) as connection,
        ):
            # A server checks the client's certificate only after the client's handshake is done.
            connection.sendall(_HELLO)
            if connection.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        return _certificate_problem(address, tls, name, error)
    except (ssl.SSLEOFError, ConnectionError):
        pass
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
    if tls.cert is not None:
        return f"ends the TLS connection ({reason}): it may not accept the certificate {tls.cert}"
    return (
        f"ends the TLS connection ({reason}): it may ask for a certificate, and this client shows "
        "none; give it Tls(cert=…, key=…), or --client_cert and --client_key"
    )


def _certificate_problem(
    address: targets.Address, tls: "Tls", name: str, error: ssl.SSLCertVerificationError
) -> str:
    reason = error.verify_message.rstrip(".")
    if error.verify_code not in _WRONG_NAME:
        trusted = "the public authorities" if tls.ca is None else f"the authorities in {tls.ca}"
        return f"shows a certificate that is not valid by {trusted}: {reason}"
    context = tls.context()
    context.check_hostname = False
    with _connected(address) as plain, context.wrap_socket(plain) as connection:
        certificate = connection.getpeercert() or {}
    names = ", ".join(str(entry[1]) for entry in certificate.get("subjectAltName", ()))
    return (
        f"shows a certificate for {names or 'no name'} and not for {name}: give one of its names "
        "with Tls(name=…) or --tls_name, or another target"
    )


def _connected(address: targets.Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), timeout=PATIENCE)


def _anyone() -> ssl.SSLContext:
    """A context that accepts any certificate; only for connections over which nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
