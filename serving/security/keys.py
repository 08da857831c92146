"""API keys and their permissions, from a TOML file that contains only the keys' digests.

The file is checked for changes while calls arrive, at most once a second. If a changed file is
faulty, that is logged and the keys in use stay. A key is 256 random bits, so it cannot be guessed
from a plain digest.
"""

import hashlib
import hmac
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving.errors import RequestError, StartError
from serving.security.caller import ANONYMOUS, Caller, CallerLimits, Permission
from serving.security.watched_files import WatchedFiles
from serving.telemetry.rate_limited_log import RateLimitedLog

METADATA_KEY = "authorization"
SCHEME = "Bearer "
CHECK_SECONDS = 1.0
# A client without a key causes refusals at any rate; they are logged at most this often.
LOG_SECONDS = 10.0

NAME = r"^[A-Za-z0-9._-]{1,64}$"

_PUBLIC = ("/grpc.health.v1.Health/",)
# Methods that every key may call.
_ANY_KEY = ("/grpc.reflection.",)

Metadata = Iterable[tuple[str, str | bytes]]

_log = structlog.stdlib.get_logger(__name__)


class _Entry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    permissions: frozenset[Permission] = frozenset({"generate"})
    max_sequences: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_priority: Annotated[int, Field(ge=-100, le=100)] = 0
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    cache_scope: Annotated[str, Field(pattern=NAME)] | None = None

    def caller(self) -> Caller:
        limits = CallerLimits(self.max_sequences, self.max_tokens, self.max_priority, self.weight)
        return Caller(self.name, self.permissions, limits, self.cache_scope or self.name)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[_Entry, ...]

    @model_validator(mode="after")
    def _is_unambiguous(self) -> "_File":
        for field in ("name", "sha256"):
            values = [getattr(entry, field).lower() for entry in self.keys]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two keys have the {field} {twice}")
        return self


class KeyRing:
    """The current keys of a file. `needs` has the permission for each service's methods.

    Raises:
        StartError: the file cannot be read, or breaks a rule.
    """

    def __init__(self, path: Path, needs: Mapping[str, Permission]) -> None:
        self._path = path
        self._needs = {f"/{service}/": permission for service, permission in needs.items()}
        self._refusals = RateLimitedLog(LOG_SECONDS)
        self._checked = time.monotonic()
        self._file = WatchedFiles([path])
        try:
            self._callers = _read(path)
        except ValueError as error:
            raise StartError(str(error)) from error

    def authorize(self, method: str, metadata: Metadata) -> Caller:
        """The caller of `method`, given the call's metadata.

        Raises:
            RequestError: UNAUTHENTICATED without a known key, PERMISSION_DENIED if the key lacks
                the permission.
        """
        if method.startswith(_PUBLIC):
            return ANONYMOUS
        self._reload()
        try:
            caller = self._caller(metadata)
            self._check(caller, method)
        except RequestError as refusal:
            reason = refusal.message
            self._refusals.warn(_log, "caller refused", code=refusal.code.name, reason=reason)
            raise
        return caller

    def _caller(self, metadata: Metadata) -> Caller:
        sent = next((value for key, value in metadata if key == METADATA_KEY), None)
        if not isinstance(sent, str) or sent[: len(SCHEME)].lower() != SCHEME.lower():
            rule = f"needs an API key: send it as metadata {METADATA_KEY!r}, as 'Bearer KEY'"
            raise RequestError(grpc.StatusCode.UNAUTHENTICATED, f"this service {rule}")
        digest = key_digest(sent[len(SCHEME) :].strip())
        found = None
        # All are compared, each in constant time, so that the duration reveals nothing.
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise RequestError(grpc.StatusCode.UNAUTHENTICATED, "the API key is not known here")
        return found

    def _check(self, caller: Caller, method: str) -> None:
        if method.startswith(_ANY_KEY):
            return
        needed = next((p for prefix, p in self._needs.items() if method.startswith(prefix)), None)
        if needed is None or needed not in caller.permissions:
            lacking = f"the permission {needed!r}" if needed else "a permission for this method"
            message = f"the API key {caller.name!r} lacks {lacking}"
            raise RequestError(grpc.StatusCode.PERMISSION_DENIED, message)

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        if not self._file.changed():
            return
        try:
            self._callers = _read(self._path)
        except ValueError as error:
            _log.error("API keys not reloaded, the old ones stay", reason=str(error))
        else:
            _log.info("API keys reloaded", keys=len(self._callers))


def key_digest(key: str) -> str:
    """The digest by which the file names a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def _read(path: Path) -> dict[str, Caller]:
    """Callers by their keys' digests; ValueError with the file's name if the file is faulty."""
    try:
        content = _File.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        # Without the values, because a misplaced one may be a key.
        problems = (
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}".lstrip(": ")
            for each in error.errors(include_input=False, include_url=False)
        )
        raise ValueError(f"{path}: {'; '.join(problems)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a TOML file in UTF-8: {error}") from error
    return {entry.sha256.lower(): entry.caller() for entry in content.keys}
