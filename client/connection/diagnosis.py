"""Why a gateway cannot be reached: a proxy on the way, or two sides that do not agree on TLS.

gRPC says "OK" or "Socket closed" there. So after a call that reached nothing, this connects once
more by itself, with the TLS of Python's standard library, and reads what the other side answers.
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

# Seconds that the other side has for each of its answers.
PATIENCE = 5.0

# The beginning of every HTTP/2 connection: the preface, then an empty SETTINGS frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = bytes((4,))  # the type of the frame that a server begins with
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_WRONG_NAME = frozenset({62, 64})
_OWN_TLS = "give the client tls=Tls(ca=…), the command --ca FILE, or --tls for a public authority"


def explained(error: ChasquiError, target: str, tls: "Tls | None") -> ChasquiError:
    """The error, or a better one where it says that the target cannot be reached. Blocks."""
    if not isinstance(error, UnreachableError) or error.request_id is not None:
        return error
    if (proxy := targets.proxy(target)) is not None:
        return ConnectionSettingsError(
            f"{error.message}, {proxy}; no_proxy={targets.addresses(target)[0].host} exempts it"
        )
    # gRPC has tried all addresses of a target. One says enough.
    for address in targets.addresses(target)[:1]:
        problem = _problem(address, tls)
        if problem is not None:
            return ConnectionSettingsError(f"{target} {problem}")
    return error


async def explained_aio(error: ChasquiError, target: str, tls: "Tls | None") -> ChasquiError:
    """The same in a thread, so that the event loop is not blocked."""
    if not isinstance(error, UnreachableError):
        return error
    return await asyncio.to_thread(explained, error, target, tls)


def _problem(address: targets.Address, tls: "Tls | None") -> str | None:
    """The fault between the two sides; None if this connection finds none."""
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
    except (OSError, ValueError):  # it does not answer at all, or has no name, as gRPC has said
        pass
    return None


def _speaks_tls(address: targets.Address) -> bool:
    """Whether it answers a handshake, be it with a refusal."""
    try:
        with _connected(address) as plain, _anyone().wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except ConnectionError:
        return False


def _plaintext_answer(address: targets.Address) -> bytes:
    """The beginning of its answer to HTTP/2 in plaintext, up to the type of the first frame."""
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
            # A server judges the client's certificate behind the client's part of the handshake.
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
    """For a connection to a server of any name and authority, over which nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
