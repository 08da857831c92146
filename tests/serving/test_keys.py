"""API keys: who is who, what each may do, and what a changed file changes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import RequestError, StartError
from serving.security import keys
from serving.security.caller import Caller, CallerLimits
from serving.security.keys import KeyRing, key_digest

NEEDS: Any = {"test.Echo": "generate", "test.Operator": "operate"}
Logged = Callable[[], list[dict[str, Any]]]


def entry(name: str, key: str, more: str = "") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{key_digest(key)}"\n{more}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(
        entry("ada", "secret-a", "max_sequences = 3\nweight = 2.0")
        + entry("operator", "secret-o", 'permissions = ["operate"]')
    )
    return file


def call(ring: KeyRing, key: str, method: str = "/test.Echo/Say") -> Caller | grpc.StatusCode:
    """The caller, or how it is refused."""
    try:
        return ring.authorize(method, [("x", b"y"), ("authorization", f"Bearer {key}")])
    except RequestError as error:
        return error.code


def test_key_tells_name_permissions_and_limits(path: Path) -> None:
    caller = call(KeyRing(path, NEEDS), "secret-a")
    limits = CallerLimits(max_sequences=3, weight=2.0)
    assert caller == Caller("ada", frozenset({"generate"}), limits, cache_scope="ada")


def test_keys_share_cached_prompts_where_the_file_says_so(path: Path) -> None:
    path.write_text(
        entry("ada", "a", 'cache_scope = "us"') + entry("ben", "b", 'cache_scope = "us"')
    )
    ring = KeyRing(path, NEEDS)
    callers = [call(ring, key) for key in "ab"]
    assert [caller.cache_scope for caller in callers if isinstance(caller, Caller)] == ["us", "us"]


@pytest.mark.parametrize(
    ("key", "method", "code"),
    [
        ("secret-a", "/test.Operator/Look", grpc.StatusCode.PERMISSION_DENIED),
        ("secret-o", "/test.Echo/Say", grpc.StatusCode.PERMISSION_DENIED),
        ("secret-o", "/test.Unknown/Say", grpc.StatusCode.PERMISSION_DENIED),
        ("secret", "/test.Echo/Say", grpc.StatusCode.UNAUTHENTICATED),
        ("", "/grpc.reflection.v1alpha.ServerReflection/X", grpc.StatusCode.UNAUTHENTICATED),
        ("", "/grpc.reflection.v1.ServerReflection/X", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_what_a_key_does_not_allow_is_refused(
    path: Path, key: str, method: str, code: grpc.StatusCode
) -> None:
    assert call(KeyRing(path, NEEDS), key, method) == code


def test_health_needs_no_key_and_reflection_any(path: Path) -> None:
    ring = KeyRing(path, NEEDS)
    assert ring.authorize("/grpc.health.v1.Health/Check", []).name == ""
    reflected = call(ring, "secret-a", "/grpc.reflection.v1alpha.ServerReflection/X")
    assert isinstance(reflected, Caller)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_no_other_text_is_a_key(path: Path, text: str) -> None:
    found = call(KeyRing(path, NEEDS), text)
    assert isinstance(found, Caller) == (text.strip() in {"secret-a"}) or text.strip() == "secret-o"


def test_changed_file_counts_at_the_next_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr(keys, "CHECK_SECONDS", 0)
    ring = KeyRing(path, NEEDS)
    path.write_text(entry("bob", "secret-b"))
    assert call(ring, "secret-a") == grpc.StatusCode.UNAUTHENTICATED
    assert isinstance(call(ring, "secret-b"), Caller)
    path.write_text("[[keys]]")
    assert isinstance(call(ring, "secret-b"), Caller)
    [broken] = [line for line in logged() if "not reloaded" in line["event"]]
    assert "keys.0.name: Field required" in broken["reason"]


def test_key_is_revoked_by_an_edit_in_place_that_keeps_the_time_stamp(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "CHECK_SECONDS", 0)
    ring, before = KeyRing(path, NEEDS), path.stat()
    path.write_text(path.read_text().replace(key_digest("secret-a"), key_digest("secret-b")))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert call(ring, "secret-a") == grpc.StatusCode.UNAUTHENTICATED


def test_refusals_are_logged_rarely_and_without_the_key(path: Path, logged: Logged) -> None:
    ring = KeyRing(path, NEEDS)
    for number in range(1000):
        call(ring, f"guess-{number}")
    [line] = logged()
    assert line["event"] == "caller refused"
    assert "guess" not in str(line)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("keys = 1", "keys: "),
        ("", "keys: Field required"),
        ("[[keys]", "not a TOML file"),
        (entry("a b", "k"), "keys.0.name: "),
        (entry("a", "k") + entry("a", "l"), "two keys have the name a"),
        (entry("a", "k", "wieght = 2"), "keys.0.wieght: "),
        (entry("a", "k", 'permissions = ["rule"]'), "keys.0.permissions"),
    ],
)
def test_wrong_file_is_explained(path: Path, content: str, problem: str) -> None:
    path.write_text(content)
    with pytest.raises(StartError) as stopped:
        KeyRing(path, NEEDS)
    assert str(stopped.value).startswith(f"{path}: ")
    assert problem in str(stopped.value)
