"""Targets: valid ones, those on this machine, and those behind a proxy."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from client import AsyncClient, Client, ConnectionSettingsError
from client.connection.targets import Address, addresses, is_local, proxy
from tests.command import Run

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("127.0.0.1:50051", [Address("127.0.0.1", 50051)]),
        ("chat.example.org:443", [Address("chat.example.org", 443)]),
        ("[::1]:50051", [Address("::1", 50051)]),
        ("dns:gateway:1", [Address("gateway", 1)]),
        ("dns:///gateway:1", [Address("gateway", 1)]),
        ("dns://8.8.8.8/gateway:1", [Address("gateway", 1)]),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", [Address("10.0.0.1", 1), Address("10.0.0.2", 2)]),
        ("ipv6:[fe80::1%eth0]:1", [Address("fe80::1%eth0", 1)]),
        ("unix:///run/chasqui.sock", []),
    ],
)
def test_a_target_names_addresses(target: str, found: list[Address]) -> None:
    assert addresses(target) == found


@pytest.mark.parametrize(
    "target",
    [
        *("", ":50051", "localhost", "localhost:", "localhost:grpc", "localhost:0"),
        *("localhost:65536", "::1", "::1:50051", "localhost:50051/", "a b:1", "ada@host:1"),
        *("localhost:50051,b:1", "dns:///gateway", "ipv4:127.0.0.1", "http://localhost:50051"),
        *("https://a:1", "grpc://a:1"),
    ],
)
def test_what_is_no_target_is_refused_before_it_is_connected_to(target: str) -> None:
    with pytest.raises(
        ValueError, match=r"^target must be host:port, such as 127\.0\.0\.1:50051, "
    ) as no:
        Client(target)
    assert str(no.value).endswith(f"not {target!r}")


async def test_both_clients_and_the_commands_refuse_a_url(run: Run) -> None:
    with pytest.raises(ValueError, match=r"without http:// \(TLS is an option of its own\)"):
        AsyncClient("http://127.0.0.1:50051")
    done = await asyncio.to_thread(run, "status", "--target", "http://127.0.0.1:50051")
    assert done.returncode == 2
    assert "without http:// (TLS is an option of its own)" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("target", "local"),
    [
        *((f"{host}:1", True) for host in ("127.0.0.1", "127.8.9.1", "0.0.0.0")),
        *((f"{host}:1", True) for host in ("localhost", "LOCALHOST", "localhost.", "a.localhost")),
        *((f"[{host}]:1", True) for host in ("::1", "::", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1")),
        *((f"{form}localhost:1", True) for form in ("dns:", "dns:///", "dns://8.8.8.8/")),
        *(("ipv4:127.0.0.1:1", True), ("ipv6:[::1]:1", True), ("unix:/run/a", True)),
        *(("ipv4:127.0.0.1:1,10.0.0.1:1", False), ("localhost.example.org:1", False)),
        *(("10.0.0.1:1", False), ("[fe80::1]:1", False), ("127.example.org:1", False)),
    ],
)
def test_this_machine_is_known_by_all_of_its_names(target: str, local: bool) -> None:
    assert is_local(target) is local


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy:3128"}, ("http_proxy", "proxy:3128")),
        ({"http_proxy": "http://a:1", "grpc_proxy": "http://b:2"}, ("grpc_proxy", "b:2")),
        ({"https_proxy": "http://ada:secret@proxy:3128"}, ("https_proxy", "proxy:3128")),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "other.org, example.org"}, None),
        (
            {"http_proxy": "http://p:1", "no_proxy": "example.org", "no_grpc_proxy": ""},
            ("http_proxy", "p:1"),
        ),
    ],
)
def test_the_proxy_of_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: tuple[str, str] | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    known = proxy("chat.example.org:50051")
    assert (known and (known.variable, known.address)) == found
    assert proxy("LOCALHOST:50051") is None


def test_networks_are_exempt_from_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy("10.1.2.3:50051") is None
    assert proxy("11.1.2.3:50051") is not None


@pytest.mark.parametrize("spelling", ["ipv4:127.0.0.1:", "LOCALHOST:", "dns:///localhost:"])
def test_a_proxy_is_not_asked_for_this_machine(
    target: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port = target.rpartition(":")[2]

    with Client(spelling + port) as client:
        assert client.get_model(timeout=30).name == "gqa-mp1"


def test_a_proxy_that_lets_nothing_through_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", f"http://ada:secret@{address}")

        with (
            Client("gateway.invalid:50051") as client,
            pytest.raises(ConnectionSettingsError) as no,
        ):
            client.get_model(timeout=30)

    assert str(no.value) == (
        "nothing answers at gateway.invalid:50051 (Connection refused), by way of the proxy "
        f"{address}, which the variable http_proxy names; no_proxy=gateway.invalid exempts it"
    )


def test_the_python_examples_give_one_answer_and_ask_no_proxy(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    folder = Path(__file__).parents[2] / "examples" / "python"
    answers = [
        subprocess.run(
            [sys.executable, folder / name, "Hello", target],
            capture_output=True,
            text=True,
            check=False,
        )
        for name in ("chat.py", "stubs.py")
    ]
    assert [(each.returncode, each.stderr) for each in answers] == [(0, "")] * 2
    assert answers[0].stdout == answers[1].stdout != "\n"
