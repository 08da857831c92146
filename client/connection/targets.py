"""Targets: the addresses of gateways, as users write them, and the proxies on the way to them.

A target is host:port, or one of gRPC's own forms such as dns:///host:port or unix:/path. Anything
else is refused here: gRPC would replace a missing port by 443 and look up a URL as a host name.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from client import arguments

_FORMS = "such as 127.0.0.1:50051, [::1]:50051 or chat.example.org:50051"
# gRPC's schemes that are followed by host and port, and those that are not.
_WITH_HOST = ("dns", "ipv4", "ipv6")
_WITHOUT_HOST = ("unix", "unix-abstract", "vsock", "xds")
_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[^\s\[\]/]+)\]|(?P<host>[^\s\[\]/:@]+)):(?P<port>\d{1,5})")
# In the order in which gRPC looks for them.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to connect to."""

    host: str  # an IPv6 address without its brackets
    port: int


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that gRPC uses for a target, and the environment variable that names it."""

    variable: str
    address: str  # without user and password

    def __str__(self) -> str:
        return f"by way of the proxy {self.address}, which the variable {self.variable} names"


def addresses(target: str) -> list[Address]:
    """The addresses that a target names; none for a form without hosts, such as a Unix socket's.

    Raises:
        ValueError: it is not a valid target.
    """
    scheme, colon, rest = arguments.text(target).partition(":")
    if colon and scheme in _WITHOUT_HOST:
        return []
    if rest.startswith("//") and scheme not in _WITH_HOST:
        raise ValueError(
            f"must be host:port, {_FORMS}, without {scheme}:// (TLS is an option of its own), "
            f"not {target!r}"
        )
    if colon and scheme in _WITH_HOST:
        # dns://server/host:port names the DNS server, too.
        listed = rest[2:].partition("/")[2] if rest.startswith("//") else rest
        return [_address(each, target) for each in listed.split(",")]
    return [_address(target, target)]


def is_local(target: str) -> bool:
    """Whether the target is on this machine."""
    found = addresses(target)
    return not found or all(_is_local(address.host) for address in found)


def proxy(target: str) -> Proxy | None:
    """The proxy that gRPC uses for the target, by gRPC's rules for environment variables."""
    if is_local(target):
        return None
    variable = next((name for name in _PROXIES if os.environ.get(name)), None)
    exceptions = next((os.environ[name] for name in _EXCEPTIONS if name in os.environ), "")
    if variable is None or _is_excepted(addresses(target)[0].host, exceptions):
        return None
    return Proxy(variable, os.environ[variable].rpartition("@")[2].rpartition("//")[2])


def _address(text: str, target: str) -> Address:
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise ValueError(f"must be host:port, {_FORMS}, not {target!r}")
    return Address(found["host"] or found["ipv6"], int(found["port"]))


def _is_local(host: str) -> bool:
    try:
        ip = ip_address(host)
    except ValueError:
        return f".{host.lower().rstrip('.')}".endswith(".localhost")
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_unspecified


def _is_excepted(host: str, exceptions: str) -> bool:
    for entry in filter(None, map(str.strip, exceptions.split(","))):
        if host.lower().endswith(entry.lower()):
            return True
        with suppress(ValueError):
            if ip_address(host) in ip_network(entry, strict=False):
                return True
    return False
