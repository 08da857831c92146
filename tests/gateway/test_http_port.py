"""The HTTP port: clients that cannot be trusted, certificates, keys, and other sites' pages."""

import asyncio
import gc
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from gateway.http.connection import Connection
from serving.errors import StartError
from serving.intake.grpc_options import METADATA_BYTES
from tests.gateway.conftest import RunningGateway, StartGateway

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"
POST = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture
def start(start_gateway: StartGateway, tokenizer_target: str) -> Any:
    """Starts a gateway without a model, which refuses what it reads."""

    async def started(**settings: Any) -> RunningGateway:
        return await start_gateway(tokenizer_target, "127.0.0.1:9", **settings)

    return started


@asynccontextmanager
async def connected(
    gateway: RunningGateway,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = gateway.http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def sent(gateway: RunningGateway, data: str) -> str:
    """Everything that comes back until the gateway closes the connection."""
    async with connected(gateway) as (reader, writer):
        writer.write(data.encode())
        try:
            return (await reader.read()).decode()
        except ConnectionResetError:
            return ""


async def answer(reader: asyncio.StreamReader) -> str:
    """The next answer on a connection that stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    [length] = [line[15:] for line in head.lower().splitlines() if line[:15] == "content-length:"]
    return head + (await reader.readexactly(int(length))).decode()


@pytest.mark.parametrize(
    "beginning", ["", "POST / HT", "GET /health HTTP/1.1\r\nHost: a\r\n", POST], ids=repr
)
async def test_head_that_does_not_arrive_in_time_ends_the_connection(
    beginning: str, start: Any
) -> None:
    gateway = await start(receive_timeout=0.2)
    assert await sent(gateway, beginning) == ""
    async with connected(gateway) as (reader, writer):
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert "200 OK" in await answer(reader)
        writer.write(beginning.encode() or b"G")
        assert await reader.read() == b""


async def test_body_that_does_not_arrive_in_time_is_refused(start: Any) -> None:
    gateway = await start(receive_timeout=0.2)
    async with connected(gateway) as (reader, writer):
        writer.write(f"{POST}Content-Length: 100\r\n\r\n{{".encode())
        assert "408 Request Timeout" in await answer(reader)


async def test_idle_connection_is_closed(start: Any) -> None:
    gateway = await start(max_connection_idle=0.2)
    async with connected(gateway) as (reader, writer):
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        await answer(reader)
        assert await reader.read() == b""


async def test_small_writes_do_not_wait_for_acknowledgements(start: Any) -> None:
    gateway = await start()
    async with connected(gateway) as (reader, writer):
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        await answer(reader)
        host, port = writer.get_extra_info("sockname")
        [served] = [
            each.transport.get_extra_info("socket")
            for each in gc.get_objects()
            if type(each) is Connection and each.client == (host, port)
        ]
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("headers", [1, 400])
async def test_head_that_is_too_large_is_refused(headers: int, start: Any) -> None:
    gateway = await start()
    value = "a" * (2 * METADATA_BYTES // headers)
    padding = "".join(f"x-{number}: {value}\r\n" for number in range(headers))
    assert "431 " in await sent(gateway, f"GET /version HTTP/1.1\r\nHost: a\r\n{padding}\r\n")


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 2000\r\n\r\n" + " " * 2000,
        f"Transfer-Encoding: chunked\r\n\r\n7d0\r\n{' ' * 2000}\r\n0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_body_that_is_too_large_is_refused(framing: str, start: Any) -> None:
    gateway = await start(max_request_bytes=1000)
    async with connected(gateway) as (reader, writer):
        writer.write(f"{POST}{framing}".encode())
        told = await answer(reader)
        assert "413 " in told
        assert "the body has more than 1000 bytes" in told
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert "200 OK" in await answer(reader)


async def test_body_of_too_many_values_is_refused_before_it_is_parsed(start: Any) -> None:
    gateway = await start(max_request_fields=100)
    body = b'{"messages": [' + b"{}," * 100 + b"{}]}"
    async with httpx2.AsyncClient(base_url=gateway.http_url) as http:
        refused = await http.post(CHAT, content=body, headers=JSON)
    assert refused.status_code == 413
    assert "more than 100 fields" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "request_text",
    [
        f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /version",
        f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
        f"{POST}Content-Length: +5\r\n\r\n12345",
        f"{POST}Content-Length : 5\r\n\r\n12345",
        f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        f"{POST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        f"{POST}Transfer-Encoding: chunked\r\n\r\n5;\n12345\r\n0\r\n\r\n",
        "GET /version HTTP/1.1\r\n\r\n",
        "GET /ver sion HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x16\x03\x01\x02",
    ],
    ids=repr,
)
async def test_malformed_or_ambiguous_request_ends_its_connection(
    request_text: str, start: Any
) -> None:
    gateway = await start(receive_timeout=1)
    told = await sent(gateway, request_text)
    assert told.count("HTTP/1.1 ") <= 1
    assert "200 OK" not in told


async def test_connections_beyond_the_bound_are_closed(start: Any) -> None:
    gateway = await start(max_connections=1)
    async with connected(gateway) as (reader, writer):
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert "200 OK" in await answer(reader)
        assert await sent(gateway, "") == ""
        writer.write(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert "200 OK" in await answer(reader)


async def test_requests_of_one_connection_have_their_own_keys_and_ids(
    start: Any, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nname = "friend"\nsha256 = "{digest}"\n')
    gateway = await start(api_keys=tmp_path / "keys.toml")
    with_key = (
        "GET /version HTTP/1.1\r\nHost: a\r\nx-request-id: one\r\nAuthorization: Bearer secret"
    )
    without = "GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    async with connected(gateway) as (reader, writer):
        writer.write(f"{with_key}\r\n\r\n{without}".encode())
        first, second = await answer(reader), await answer(reader)
        assert "200 OK" in first
        assert "x-request-id: one" in first
        assert "401 Unauthorized" in second
        assert "www-authenticate: Bearer" in second
        assert "x-request-id: one" not in second
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert "503 " in await answer(reader)  # needs no key
    told = await sent(gateway, f"{POST}Authorization: Bearer x\r\nConnection: close\r\n\r\n")
    assert "the API key is not known here" in told


async def test_pages_of_allowed_origins_alone_may_call(start: Any) -> None:
    gateway = await start(http_origins="https://a.example,https://b.example")
    async with httpx2.AsyncClient(base_url=gateway.http_url) as http:
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        allowed = await http.options(CHAT, headers={"origin": "https://b.example", **asks})
        assert allowed.headers["access-control-allow-origin"] == "https://b.example"
        other = await http.options(CHAT, headers={"origin": "https://c.example", **asks})
        assert other.status_code == 400
        told = await http.post(CHAT, json={}, headers={"origin": "https://a.example"})
        assert told.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in told.headers["access-control-expose-headers"].lower()


async def test_port_that_is_taken_is_a_start_error_and_port_zero_is_none(start: Any) -> None:
    gateway = await start()
    taken = int(gateway.http_url.rpartition(":")[2])
    with pytest.raises(StartError, match="another port with --http_port"):
        await start(http_port=taken)
    assert (await start(http_port=0)).http_url == "http://"


def issue(authority: trustme.CA, folder: Path) -> dict[str, Path]:
    """The files of a new certificate, in place of those that were there."""
    issued = authority.issue_cert("127.0.0.1")
    files = {name: folder / f"{name}.pem" for name in ("cert", "key", "ca")}
    files["cert"].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    files["key"].write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(files["ca"])
    return files


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def version(gateway: RunningGateway, context: ssl.SSLContext) -> int:
    """The status of a request on a connection of its own."""
    url = gateway.http_url.replace("http:", "https:")
    async with httpx2.AsyncClient(base_url=url, verify=context) as http:
        return (await http.get("/version")).status_code


async def test_certificates_are_reloaded_and_clients_of_other_authorities_refused(
    start: Any, tmp_path: Path
) -> None:
    old, new = trustme.CA(), trustme.CA()
    files = issue(old, tmp_path)
    tls = {"tls_cert": files["cert"], "tls_key": files["key"], "tls_client_ca": files["ca"]}
    gateway = await start(**tls)
    known = trusting(old)
    with pytest.raises((httpx2.TransportError, ssl.SSLError)):
        await version(gateway, known)  # shows no certificate
    old.issue_cert("client.example").configure_cert(known)
    assert await version(gateway, known) == 200
    issue(new, tmp_path)
    renewed = trusting(new)
    new.issue_cert("client.example").configure_cert(renewed)
    assert await version(gateway, renewed) == 200
    old.issue_cert("client.example").configure_cert(renewed)
    with pytest.raises((httpx2.TransportError, ssl.SSLError)):
        await version(gateway, renewed)
