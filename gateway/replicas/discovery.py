"""Resolves targets to addresses. A name may have many, such as one for each ready pod of a headless
Kubernetes service, and they change, so names are resolved again and again.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

import structlog

_DNS = "dns:///"

_log = structlog.stdlib.get_logger(__name__)


class Discovery:
    """The addresses behind a list of targets."""

    def __init__(self, targets: Sequence[str]) -> None:
        """A target is `host:port` or `dns:///host:port`; anything else is left to gRPC."""
        self._targets = targets
        self._found: dict[str, list[str]] = {}  # by target, as far as it could be resolved
        self._reasons: dict[str, str] = {}  # why a target cannot be resolved now

    @property
    def changes(self) -> bool:
        """Whether any target is a name."""
        return any(_named(target) for target in self._targets)

    async def addresses(self) -> dict[str, str | None]:
        """All current addresses, each with the name that it was resolved from, or None.

        A name that cannot be resolved keeps its last known addresses.
        """
        await asyncio.gather(*map(self._resolve, self._targets))
        found: dict[str, str | None] = {}
        for target in self._targets:
            named = _named(target)
            for address in self._found.get(target, ()):
                found.setdefault(address, named and named[0])
        return found

    async def _resolve(self, target: str) -> None:
        named = _named(target)
        if named is None:
            self._found[target] = [target]
            return
        try:
            self._found[target] = await _lookup(*named)
            self._reasons.pop(target, None)
        except (OSError, UnicodeError) as error:
            reason = str(error)
            if self._reasons.get(target) != reason:
                _log.error("name cannot be resolved", upstream=target, reason=reason)
            self._reasons[target] = reason


async def _lookup(host: str, port: int) -> list[str]:
    """A host's addresses, of one family: a pod with both would count as two replicas."""
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found = {family: sorted({e[4][0] for e in entries if e[0] == family}) for family in _FAMILIES}
    if found[socket.AF_INET]:
        return [f"{address}:{port}" for address in found[socket.AF_INET]]
    return [f"[{address}]:{port}" for address in found[socket.AF_INET6]]


_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def _named(target: str) -> tuple[str, int] | None:
    """Host and port of a target that is a name; None for any other target."""
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    if not host or not port.isdecimal() or ":" in host:
        return None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host, int(port)
    return None
