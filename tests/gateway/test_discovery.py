"""Targets and the addresses behind them, as this machine's own resolver knows them."""

import socket

import pytest

from gateway.replicas.discovery import Discovery


async def test_addresses_stay_as_they_are() -> None:
    targets = ["10.0.0.1:1", "[::1]:2", "unix:/run/model", "10.0.0.1:1"]
    discovery = Discovery(targets)
    assert await discovery.addresses() == dict.fromkeys(targets[:3])
    assert not discovery.changes


@pytest.mark.parametrize("prefix", ["", "dns:///"])
async def test_a_name_becomes_its_addresses_of_one_family(prefix: str) -> None:
    discovery = Discovery([f"{prefix}localhost:50053"])
    assert await discovery.addresses() == {"127.0.0.1:50053": "localhost"}
    assert discovery.changes


async def test_a_name_that_is_lost_keeps_its_last_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = ["10.0.0.2", "10.0.0.1"]

    def resolver(_host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        if not answers:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, None, None, "", (each, port)) for each in answers]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    discovery = Discovery(["model:1", "10.0.0.9:1"])
    known = {"10.0.0.1:1": "model", "10.0.0.2:1": "model", "10.0.0.9:1": None}
    assert await discovery.addresses() == known
    answers.clear()
    assert await discovery.addresses() == known
