"""Clients that a gateway refuses: each is told, logged at a limited rate, and harms no other."""

import asyncio
import contextlib
import datetime
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from click.testing import CliRunner
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from chasqui.cli.main import main
from client import AsyncClient, ChasquiError, Client, Delta, Tls, UnreachableError
from client.connection.channel import open_aio_channel, open_channel
from llama.v1 import chat_pb2
from tests.e2e.deployments import Certificate, LockedGateway
from tests.e2e.processes import TIMEOUT

pytestmark = pytest.mark.alone

METHODS = chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods
HALF_OPEN = 10_000
DAY = datetime.timedelta(days=1)


def succeeds(locked: LockedGateway) -> None:
    with locked.client() as friend:
        assert friend.complete("Llamas", max_gen_len=2, timeout=60).finish_reason


@pytest.fixture
def unharmed(locked: LockedGateway) -> Iterator[Callable[[], None]]:
    """Checks that a friend is served, when called and at the end, and that the log stays short and
    has no line but the gateway's own.
    """
    before = len(locked.process.log)
    yield lambda: succeeds(locked)
    succeeds(locked)
    lines = locked.process.log[before:]
    assert len(lines) < 20
    assert all(line.startswith("{") for line in lines)


def status_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except ChasquiError as error:
        return error.code
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_without_a_key_nothing_but_health_answers(locked: LockedGateway, unharmed: Any) -> None:
    with open_channel(locked.process.address, locked.tls) as channel:
        for method in METHODS:
            call: Any = channel.unary_stream(f"/llama.v1.ChatService/{method.name}")
            assert status_of(partial(list, call(b""))) == grpc.StatusCode.UNAUTHENTICATED
        reflection: Any = ServerReflectionStub(channel)
        requests = [ServerReflectionRequest(list_services="")]
        listing = reflection.ServerReflectionInfo(iter(requests))
        assert status_of(partial(list, listing)) == grpc.StatusCode.UNAUTHENTICATED
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(HealthCheckRequest()).status == HealthCheckResponse.SERVING
    unharmed()


def test_wrong_key_is_refused(locked: LockedGateway, unharmed: Any) -> None:
    for wrong in ("another key", locked.key[:-1], locked.key + "x", " "):
        with Client(locked.process.address, tls=locked.tls, api_key=wrong) as refused:
            assert status_of(refused.get_model) == grpc.StatusCode.UNAUTHENTICATED
    unharmed()


def no_certificate(locked: LockedGateway, _folder: Path) -> Tls:
    return Tls(locked.ca)


def another_authoritys(locked: LockedGateway, folder: Path) -> Tls:
    return Certificate.issue(trustme.CA(), folder).tls(locked.ca)


def expired(locked: LockedGateway, folder: Path) -> Tls:
    yesterday = datetime.datetime.now(datetime.UTC) - DAY
    validity = {"not_before": yesterday - DAY, "not_after": yesterday}
    return Certificate.issue(locked.authority, folder, **validity).tls(locked.ca)


@pytest.mark.parametrize("certificate", [no_certificate, another_authoritys, expired])
def test_wrong_certificate_gets_no_connection(
    locked: LockedGateway, tmp_path: Path, unharmed: Any, certificate: Any
) -> None:
    tls = certificate(locked, tmp_path)
    for _ in range(20):
        refused = Client(locked.process.address, tls=tls, api_key=locked.key)
        with refused, pytest.raises(UnreachableError):
            refused.get_model(timeout=TIMEOUT)
    unharmed()


def test_client_trusts_no_other_authority(locked: LockedGateway, tmp_path: Path) -> None:
    elsewhere = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(elsewhere)
    tls = Tls(elsewhere, locked.tls.cert, locked.tls.key)
    client = Client(locked.process.address, tls=tls, api_key=locked.key)
    with client, pytest.raises(UnreachableError):
        client.get_model(timeout=TIMEOUT)


def test_plaintext_to_the_tls_port_is_refused(locked: LockedGateway, unharmed: Any) -> None:
    refused = Client(locked.process.address, api_key=locked.key)
    with refused, pytest.raises(UnreachableError):
        refused.get_model(timeout=TIMEOUT)
    unharmed()


def test_tls_to_a_plaintext_port_is_refused(locked: LockedGateway, unharmed: Any) -> None:
    refused = Client(locked.health_address, tls=locked.tls)
    with refused, pytest.raises(UnreachableError):
        refused.get_model(timeout=TIMEOUT)
    unharmed()


def test_http_1_is_hung_up_on(locked: LockedGateway, unharmed: Any) -> None:
    context = ssl.create_default_context(cafile=locked.ca)
    context.load_cert_chain(locked.tls.cert or "", locked.tls.key)
    for encrypted in (False, True):
        sock = socket.create_connection(("127.0.0.1", locked.port), TIMEOUT)
        if encrypted:
            sock = context.wrap_socket(sock, server_hostname="localhost")
        with sock, contextlib.suppress(ConnectionError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while sock.recv(4096):
                pass
    unharmed()


def test_huge_metadata_is_refused(locked: LockedGateway, unharmed: Any) -> None:
    refused = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED}
    with open_channel(locked.process.address, locked.tls) as channel:
        call: Any = channel.unary_unary("/llama.v1.ChatService/GetModel")
        huge = (("x-padding", "x" * 100_000),)
        for _ in range(5):
            assert status_of(lambda: call(b"", metadata=huge)) in refused
    unharmed()


def test_half_open_connections_keep_no_other_out(locked: LockedGateway, unharmed: Any) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        for _ in range(min(HALF_OPEN, hard - 1_000)):
            stack.enter_context(socket.create_connection(("127.0.0.1", locked.port)))
        unharmed()


async def test_half_open_streams_of_untrusted_clients_are_refused_at_once(
    locked: LockedGateway, unharmed: Any
) -> None:
    async with open_aio_channel(locked.process.address, locked.tls) as channel:
        method: Any = channel.stream_unary("/llama.v1.ChatService/ChatComplete")
        calls = [method() for _ in range(HALF_OPEN)]
        await asyncio.to_thread(unharmed)
        codes = {await call.code() for call in calls}
    # A connection that had so many refused may be closed, and the rest of its calls with it.
    closed = {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert grpc.StatusCode.UNAUTHENTICATED in codes
    assert codes <= closed | {grpc.StatusCode.UNAUTHENTICATED}


async def test_half_open_streams_of_friends_end_in_time(
    locked: LockedGateway, unharmed: Any
) -> None:
    metadata = (("authorization", f"Bearer {locked.key}"),)
    async with open_aio_channel(locked.process.address, locked.tls) as channel:
        method: Any = channel.stream_unary("/llama.v1.ChatService/ChatComplete")
        call = method(metadata=metadata)
        await asyncio.to_thread(unharmed)
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not arrive within 2 seconds" in await call.details()


async def test_friend_is_served_by_both_clients(locked: LockedGateway) -> None:
    address = locked.process.address
    async with AsyncClient(address, tls=locked.tls, api_key=locked.key) as friend:
        answer = await friend.complete("Llamas", max_gen_len=2)
        events = [event async for event in friend.complete_stream("Llamas", max_gen_len=2)]
    with locked.client() as client:
        again = list(client.complete_stream("Llamas", max_gen_len=2))
    texts = ["".join(e.text for e in each if isinstance(e, Delta)) for each in (events, again)]
    assert texts[0] == texts[1]
    assert answer.usage.completion_tokens <= 2


def test_keys_are_in_no_log_line(locked: LockedGateway) -> None:
    succeeds(locked)
    assert locked.key not in "".join(locked.process.log)


def test_command_opens_a_locked_gateway(locked: LockedGateway, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"{locked.key}\n")
    flags = ["--target", locked.process.address, "--ca", str(locked.ca), "--max_gen_len", "2"]
    flags += ["--client_cert", str(locked.tls.cert), "--client_key", str(locked.tls.key)]
    run = CliRunner().invoke
    assert run(main, ["complete", "Llamas", *flags, "--api_key_file", str(key_file)]).exit_code == 0
    by_variable = run(main, ["complete", "Llamas", *flags], env={"CHASQUI_API_KEY": locked.key})
    assert by_variable.exit_code == 0
    refused = run(main, ["complete", "Llamas", *flags])
    assert refused.exit_code == 1
    assert "needs an API key" in refused.stderr
